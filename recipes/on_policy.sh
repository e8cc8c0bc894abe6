#!/usr/bin/env bash
# On-policy distillation in rounds: the student answers prompts, and the teacher is asked about what it wrote.
#
# Each round has three stages (four with CACHE=1):
#   answer-N       SAMPLES rows of DATA; the student as it is now writes the response of the share ON_POLICY of them. The other
#                  rows keep theirs. The texts are the same on any number of ranks
#   data-N         both as training data: own text token for token as it was written. It is compared with the teacher, and
#                  is not denoised: it is no gold
#   cache-N        CACHE=1: the teacher answers the round first
#   train-round-N  STEPS steps: one schedule over all rounds, and the optimizer goes on where the round before it ended
# A round of training covers its data once where SAMPLES is STEPS times the batch, the default.
# ON_POLICY=0 is the same with new rows of the corpus in each round, to compare with.
#
# Output:    runs/on_policy/hf, a Hugging Face folder of the student, with a model card; the last line says what the rollouts cost.
# Machine:   that of distill_16b_to_0.6b.sh, and HOSTING as there.
# Launch:    bash recipes/on_policy.sh                        all GPUs of this machine; NPROC=4: four of them
#            DRY_RUN=1 bash recipes/on_policy.sh              print the commands
#            ONLY="sample bridge answer-1" bash recipes/on_policy.sh   only these stages
#            sbatch slurm/on_policy.sh                        on a Slurm cluster
# From WeDLM: TEACHER, TEACHER_LENGTH and TEACHER_MASK of distill_8b_to_0.6b.sh; from an autoregressive teacher: those of
# distill_ar_to_0.6b.sh, and as arguments  --teacher-context causal --temperature 1.
# Arguments are passed to the training:  ... --preset ours --lr 1e-5   (python -m megatron_tide.distill --help)
# If it stops for any reason, run the same command again: finished stages are skipped, answers and training resume.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-on_policy}                                              # output folder: runs/NAME
TEACHER=${TEACHER:-inclusionAI/LLaDA2.0-mini}                        # hub name, or a folder in hub format
STUDENT=${STUDENT:-dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1}         # best one that was distilled before: runs/NAME/hf
DATA=${DATA:-recipes/mixtures/paper.json}                           # a mixture, or JSONL / Parquet / hub data sets
STRATEGY=${STRATEGY:-tide-cross}                                     # see the table in README.md
ROUNDS=${ROUNDS:-4}
STEPS=${STEPS:-100}                                                  # optimizer steps per round
BATCH=${BATCH:-64}                                                   # samples per step
SAMPLES=${SAMPLES:-}                                                 # rows per round; empty: STEPS times BATCH
ON_POLICY=${ON_POLICY:-0.5}                                          # share of them that the student answers: 0 to 1
DECODING=${DECODING:---temperature 1}                                # how it answers: python -m megatron_tide rollout --help
MASKS=${MASKS:-random}                                               # of own text: random, or order: as its decoder had them
SEED=${SEED:-42}                                                     # of rows, answers, data order and noise
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
STUDENT_BLOCK=${STUDENT_BLOCK:-}                                     # block size to train the student with; empty: its own
TEACHER_LENGTH=${TEACHER_LENGTH:-1024}
HOSTING=${HOSTING:-}                                                 # where the teacher's weights are (table in README.md); empty: replicated
TEACHER_NVME=${TEACHER_NVME:-}                                       # HOSTING=zero3_nvme: a folder on a fast local disk
CACHE=${CACHE:-0}                                                    # 1: a stage per round in which the teacher answers it first (distributions: --teacher-top 64)
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}                            # 1: allow Python code from the hub repositories
# TEACHER_BLOCK, STUDENT_MASK, TEACHER_MASK, COVERAGE_FLOOR, RELEASE_DTYPE: see common.sh
# NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see launcher() in common.sh
# ---

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
[[ $ROUNDS =~ ^[1-9][0-9]*$ && $STEPS =~ ^[1-9][0-9]*$ ]] || fail "ROUNDS=$ROUNDS STEPS=$STEPS: use whole numbers from 1 on"
check_numbers ROUNDS STEPS BATCH SAMPLES
SAMPLES=${SAMPLES:-$((STEPS * BATCH))}
[[ $MASKS == random || $MASKS == order ]] || fail "MASKS=$MASKS: use random or order"
setup_environment requirements.txt

# round NUMBER STUDENT [FLAGS...]: one round, from the weights of STUDENT.
round() {
  local number=$1 now=$2 rows=$run/round-$1-answers data=$run/round-$1-data decoding=() from=() masks=()
  shift 2
  read -ra decoding <<<"$DECODING"
  on_ranks "answer-$number" "megatron_tide rollout" "$now" --data "$DATA" --round "$number" --samples "$SAMPLES" --share "$ON_POLICY" \
    --as-written --seed "$SEED" --student-length "$STUDENT_LENGTH" ${STUDENT_BLOCK:+--block-size "$STUDENT_BLOCK"} \
    ${STUDENT_MASK:+--student-mask "$STUDENT_MASK"} ${trust[@]+"${trust[@]}"} --out "$rows" "${decoding[@]}"
  prepare_pair "data-$number" "$rows/mixture.json" "$data"
  ((number == 1)) || from=(--continue-from "$now")
  [[ $MASKS != order ]] || masks=(--own-masks order --timesteps block)
  teach "$run/round-$number" "$run/cache-$number" "$data" --global-batch-size "$BATCH" --max-steps $((ROUNDS * STEPS)) \
    --until-step $((number * STEPS)) --seed "$SEED" ${from[@]+"${from[@]}"} ${masks[@]+"${masks[@]}"} "$@"
}

main() {
  local pair trust read hosting floor now=$STUDENT number
  read_settings
  build_bridge
  for ((number = 1; number <= ROUNDS; number++)); do
    round "$number" "$now" "$@"
    now=$run/round-$number
  done
  export_hf "$now" "$run/hf"
  stage report "$PYTHON" -m megatron_tide report "$run"
  [[ $DRY_RUN == 1 ]] || ! wanted report || "$PYTHON" recipes/on_policy/report.py "$run" --rounds "$ROUNDS"
}
# On one line, because bash reads a script while it runs it, and this file may be edited before the chain has finished.
main "$@"; exit
