#!/usr/bin/env bash
# Real weights on a small machine: SmolLM2-135M-Instruct -> block diffusion model -> teacher of students with fewer layers.
#
#   corpus      docstring -> code pairs of this machine's own Python standard library, split by function (as in the quickstart)
#   adaptation  the autoregressive model becomes a block diffusion model: next token -> both -> masked tokens, in one run
#   small       a student made of some of its layers, distilled with each of STRATEGIES from the same start, data and noise
#   scores      held-out bits per byte of all of them, and their completions, judged
# Output:    runs/real_small/hf (the adapted model), runs/real_small/hf_small (the first of STRATEGIES that has a teacher),
#            scores.json with all completions, report/index.html
# Machine:   SIZE=cpu: 2 cores with bf16 matmuls (AMX), 8 GiB, 30 to 45 minutes. SIZE=gpu: one GPU of 24 GB, ten minutes.
# Launch:    bash recipes/real_small.sh
#            SOURCE=SmolLM2-135M-Instruct.gguf bash recipes/real_small.sh     no hub: a GGUF file of the model
#            SIZE=gpu bash recipes/real_small.sh
#            DRY_RUN=1 bash recipes/real_small.sh                  print the commands
# A second run skips finished stages; --fresh starts over.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-real_small}
SIZE=${SIZE:-cpu}                                       # cpu or gpu: number of steps, samples per step
SOURCE=${SOURCE:-HuggingFaceTB/SmolLM2-135M-Instruct}   # hub name, folder in hub format, or .gguf file
MASK_TOKEN=${MASK_TOKEN-<reponame>}                     # a token of its vocabulary that no text becomes
BLOCK=${BLOCK:-4}
STUDENT_LENGTH=${STUDENT_LENGTH:-220}                   # in tokens; longer responses are cut
PRETRAINING=${PRETRAINING-ar:0.1,joint:0.3}             # phases of the adaptation before the last, with their shares of the steps
NOISE=${NOISE---timesteps block --timestep-sampling stratified --mask-count exact}   # flags of every training; empty: published noise
KEEP_LAYERS=${KEEP_LAYERS:-2/3}                         # layers of the small student: two of three; 1/3: every third; or 0,1,5
STRATEGIES=${STRATEGIES:-bd3lm kl tide-bridge}          # bd3lm is denoising only; tide-shared also fits, the tokenizers are equal
TEMPERATURE=${TEMPERATURE:-1}                           # of every distillation objective
LR=${LR:-3e-4}
SEED=${SEED:-42}
ADAPT_FLAGS=${ADAPT_FLAGS:-}                            # more flags for the adaptation, such as a teacher's for its own left-to-right row
case $SIZE in # steps of the adaptation and of each distillation, samples per step, test samples, completions
  cpu) sizes=(150 100 8 100 50) ;;
  gpu) sizes=(1500 800 32 400 50) ;;
  *) sizes=() ;;
esac
ADAPT_STEPS=${ADAPT_STEPS:-${sizes[0]:-}}
DISTILL_STEPS=${DISTILL_STEPS:-${sizes[1]:-}}
BATCH=${BATCH:-${sizes[2]:-}}
EVAL_SAMPLES=${EVAL_SAMPLES:-${sizes[3]:-}}
COMPLETIONS=${COMPLETIONS:-${sizes[4]:-}}
# ---

# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
((${#sizes[@]} > 0)) || fail "SIZE=$SIZE: use cpu or gpu"
[[ ${1:-} == --fresh ]] && { [[ $DRY_RUN == 1 ]] || rm -rf "$run"; shift; }
(($# == 0)) || fail "unknown argument '$1': recipes/real_small.sh takes only --fresh (settings: top of the file)"
requirements=(requirements.txt)
[[ $SOURCE != *.gguf ]] || requirements+=(requirements-real.txt)
setup_environment "${requirements[@]}"

read -ra noise <<<"$NOISE"
read -ra more <<<"$ADAPT_FLAGS"
read -ra strategies <<<"$STRATEGIES"
common=(--preset ours ${noise[@]+"${noise[@]}"} --precision bf16 --global-batch-size "$BATCH" --micro-batch-size 8 --beta2 0.98
  --lr "$LR" --seed "$SEED" --save-every 500 --keep-last 1 --log-every 5)

main() {
  local students=() name model released=
  stage corpus "$PYTHON" -m megatron_tide corpus --out "$run/corpus"
  DATA=$run/corpus/train.jsonl RELEASE_DTYPE=float32
  adapt "$SOURCE" "$run" "${common[@]}" --max-steps "$ADAPT_STEPS" ${PRETRAINING:+--pretraining "$PRETRAINING"} \
    ${more[@]+"${more[@]}"}

  # The adapted model is the teacher, and some of its layers are the student.
  stage small "$PYTHON" -m megatron_tide init-model --from "$run/hf" --keep-layers "$KEEP_LAYERS" --out "$run/small" --fresh
  local pair=(--student "$run/small" --teacher "$run/hf")
  local read=("${pair[@]}" --bridge "$run/bridge" --student-length "$STUDENT_LENGTH" --teacher-length "$STUDENT_LENGTH"
    --student-block "$BLOCK" --teacher-block "$BLOCK")
  stage pair-data "$PYTHON" -m megatron_tide sample --data "$DATA" --out "$run/sample.jsonl" \
    --then bridge "${pair[@]}" --sample "$run/sample.jsonl" --out "$run/bridge" \
    --then prepare --data "$DATA" "${read[@]}" --out "$run/pair-data" \
    --then prepare --data "$run/corpus/test.jsonl" "${read[@]}" --out "$run/test-data"
  for name in "${strategies[@]}"; do
    distil "$run/$name" "${pair[@]}" --bridge "$run/bridge" --data "$run/pair-data" --strategy "$name" "${common[@]}" \
      --temperature "$TEMPERATURE" --max-steps "$DISTILL_STEPS"
    model=$run/$name
    if [[ $name != bd3lm && -z $released ]]; then
      released=$name model=$run/hf_small
      stage convert-small "$PYTHON" -m megatron_tide convert "$run/$name" "$model" --overwrite
    fi
    students+=(--student "$name=$model")
  done

  stage scores "$PYTHON" -m megatron_tide evaluate --data "$run/test-data" --samples "$EVAL_SAMPLES" --dtype bfloat16 \
    --student start="$run/small" "${students[@]}" --student adapted="$run/hf" \
    --baseline "${strategies[0]}" --completions "$COMPLETIONS" --completion-tokens 96 --json "$run/scores.json" --card
  stage report "$PYTHON" -m megatron_tide report "$run"
}
# On one line, because bash reads a script while it runs it, and this file may be edited before it has finished.
main; exit
