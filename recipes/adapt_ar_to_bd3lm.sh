#!/usr/bin/env bash
# An autoregressive model (Qwen3-0.6B, Qwen3-1.7B, any of Qwen3's or Llama's shape) -> block diffusion student, no teacher.
#
# One training run in three phases: next token, then next token and masked tokens at once, then masked tokens only.
# Output:    runs/adapt_ar_to_bd3lm/hf, a Hugging Face folder that is a STUDENT for the distillation recipes:
#            STUDENT=runs/adapt_ar_to_bd3lm/hf bash recipes/distill_8b_to_0.6b.sh
# Machine:   one GPU of 24 GB or more for 0.6B, of 40 GB for 1.7B (with --activation-checkpointing less); N GPUs are N times
#            faster and give the same curve.
# Launch:    bash recipes/adapt_ar_to_bd3lm.sh                       all GPUs of this machine
#            SOURCE=Qwen/Qwen3-1.7B NAME=adapt_1.7b bash recipes/adapt_ar_to_bd3lm.sh
#            DRY_RUN=1 bash recipes/adapt_ar_to_bd3lm.sh             print the commands
#            ONLY="student data" bash recipes/adapt_ar_to_bd3lm.sh   only these stages, of: student data train convert report
#            sbatch slurm/adapt_ar_to_bd3lm.sh                       on a Slurm cluster
# Arguments are passed to the training:  ... --max-steps 1000 --lr 5e-5   (python -m megatron_tide.distill --help)
# If it stops for any reason, run the same command again: finished stages are skipped, training resumes from its checkpoint.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-adapt_ar_to_bd3lm}                                     # output folder: runs/NAME
SOURCE=${SOURCE:-Qwen/Qwen3-0.6B}                                   # hub name, folder in hub format, or .gguf file of Llama's shape
MASK_TOKEN=${MASK_TOKEN:-}                                          # string or id of an unused token; empty: <|mask|> is added
BLOCK=${BLOCK:-}                                                    # tokens per block; empty: SOURCE's own, or 32
PRETRAINING=${PRETRAINING-ar:0.05,joint:0.35}                       # phases before the last, with their shares of the steps
BLOCK_GROWTH=${BLOCK_GROWTH-}                                       # smaller blocks first, such as 8:0.4,16:0.3; divisors of the block size
NOISE=${NOISE---timesteps block --timestep-sampling stratified --mask-count exact}   # empty: published noise
DATA=${DATA:-recipes/mixtures/paper.json}                           # a mixture, or JSONL / Parquet / hub data sets
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
EPOCHS=${EPOCHS:-2}
LR=${LR:-1e-4}
# EVAL_DATA: prepared data that was not used for training; its scores go to runs/NAME/scores.json
# NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see launcher() in common.sh
# ---

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
requirements=(requirements.txt)
[[ $SOURCE != *.gguf ]] || requirements+=(requirements-real.txt)
setup_environment "${requirements[@]}"
read -ra noise <<<"$NOISE"

main() {
  adapt "$SOURCE" "$RUNS/$NAME" ${noise[@]+"${noise[@]}"} --epochs "$EPOCHS" --lr "$LR" ${PRETRAINING:+--pretraining "$PRETRAINING"} \
    ${BLOCK_GROWTH:+--block-growth "$BLOCK_GROWTH"} "$@"
  if [[ -n ${EVAL_DATA:-} ]]; then
    stage evaluate "$PYTHON" -m megatron_tide evaluate --data "$EVAL_DATA" --student start="$RUNS/$NAME/student" \
      --student adapted="$RUNS/$NAME/hf" --json "$RUNS/$NAME/scores.json" --card
  fi
  stage report "$PYTHON" -m megatron_tide report "$RUNS/$NAME"
}
# On one line, because bash reads a script while it runs it, and this file may be edited before it has finished.
main "$@"; exit
