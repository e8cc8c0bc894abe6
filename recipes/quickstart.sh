#!/usr/bin/env bash
# The complete pipeline on this machine's CPU, on real data, from scratch: about 11 minutes on 2 cores, under 6 GiB.
#
#   corpus      docstring -> code pairs of this machine's own Python standard library, split by function; and two tokenizers,
#               SentencePiece unigram for the teacher, byte-level BPE for the student, trained on the train split
#   models      a small llada2_moe teacher pretrained on all of the train split, a small BD3LM student on a tenth of it:
#               next token first, then both, then masked blocks
#   chain       bridge -> aligned data -> distillation with tide-bridge -> Hugging Face folder   (as in the large recipes)
#   baselines   denoising only, for the same steps and for fewer (it overfits), and TIDE-Cross as published: same start and data
#   scores      held-out bits per byte and completions of all of them, memory and speed of student and teacher:
#               runs/quickstart/report.json and the page runs/quickstart/report/index.html
#
# Launch:  bash recipes/quickstart.sh            a second run skips finished stages; --fresh starts over
#          DRY_RUN=1 bash recipes/quickstart.sh  print the commands

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-quickstart}
TEACHER_STEPS=${TEACHER_STEPS:-900}       # steps of pretraining of the teacher
STUDENT_STEPS=${STUDENT_STEPS:-600}       # steps of pretraining of the student, which all strategies start from
DISTILL_STEPS=${DISTILL_STEPS:-400}       # steps of each strategy
SHORT_STEPS=${SHORT_STEPS:-200}           # steps of the second run by denoising only
STUDENT_BLOCK=${STUDENT_BLOCK:-8}         # tokens that are denoised together: 4, 8, 16 or 32
STUDENT_LENGTH=${STUDENT_LENGTH:-256}     # in tokens; longer responses are cut at a chunk boundary
TEACHER_LENGTH=${TEACHER_LENGTH:-256}
EVAL_SPLIT=${EVAL_SPLIT:-test}            # test, or validation to choose settings
EVAL_SAMPLES=${EVAL_SAMPLES:-160}         # samples of it to score
COMPLETIONS=${COMPLETIONS:-150}           # prompts of it to complete, with at least 16 tokens each
SEED=${SEED:-42}                          # of initial weights, data order and noise
CACHE=${CACHE:-0}                         # 1: before each distillation a stage in which the teacher answers it (0.3 GB)
STRATEGY=tide-bridge
# ---

# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
FRESH=0
[[ ${1:-} == --fresh ]] && { FRESH=1; shift; }
(($# == 0)) || fail "unknown argument '$1': recipes/quickstart.sh takes only --fresh (settings: top of the file)"
check_numbers TEACHER_STEPS STUDENT_STEPS DISTILL_STEPS SHORT_STEPS
setup_environment requirements.txt
((FRESH == 0)) || remove_run

# Seconds of each stage on 2 cores, for the time left; other machines are compared by the stages that they have finished.
# shellcheck disable=SC2034 # read by common.sh
EXPECTED_SECONDS="corpus=15 teacher-data=9 train-teacher-pretraining=$((TEACHER_STEPS / 4)) teacher-convert=7 student-data=7
  train-student-pretraining=$((STUDENT_STEPS / 7)) student-convert=7 sample=1 bridge=5 data=4
  train-tide-bridge=$((DISTILL_STEPS / 4)) convert=15 train-bd3lm=$((DISTILL_STEPS / 7)) train-bd3lm-short=$((SHORT_STEPS / 5))
  train-tide-cross=$((DISTILL_STEPS / 4)) scores=100 inference-benchmark=15 report=12"
((CACHE == 0)) || EXPECTED_SECONDS+=" cache=$((DISTILL_STEPS / 8 + 12)) cache-tide-cross=$((DISTILL_STEPS / 8 + 12))"
quiet_noise=(--masking synchronous --timesteps block --timestep-sampling stratified --mask-count exact)
common=(--precision fp32 --global-batch-size 8 --micro-batch-size 8 --beta2 0.98 --seed "$SEED" --save-every 500 --keep-last 1 --log-every 20)
pretraining=("${common[@]}" "${quiet_noise[@]}" --strategy bd3lm --pretraining "ar:0.3,joint:0.4" --score-prompt --optimizer muon
  --muon-lr 0.05 --lr 1e-2 --lr-schedule linear --lr-decay-share 0.5)

# pretrain WHO CORPUS STEPS: train WHO from random weights, without a teacher -> $run/WHO, a folder in hub format
pretrain() {
  local who=$1 corpus=$2 steps=$3
  stage "$who-data" "$PYTHON" -m megatron_tide init-model --config "recipes/quickstart/$who.json" --block-size "$STUDENT_BLOCK" \
    --tokenizer "$run/tokenizers/$who" --seed "$SEED" --out "$run/init/$who" --fresh \
    --then prepare --data "$corpus" --student "$run/init/$who" --student-length "$STUDENT_LENGTH" --out "$run/$who-data"
  distil "$run/$who-pretraining" --student "$run/init/$who" --data "$run/$who-data" "${pretraining[@]}" --max-steps "$steps"
  stage "$who-convert" "$PYTHON" -m megatron_tide convert "$run/$who-pretraining" "$run/$who" --dtype float32 --overwrite --skip-parity
}

stage corpus "$PYTHON" -m megatron_tide corpus --out "$run/corpus" \
  --then train-tokenizers --data "$run/corpus/train.jsonl" --student-out "$run/tokenizers/student" --teacher-out "$run/tokenizers/teacher"
pretrain teacher "$run/corpus/train.jsonl" "$TEACHER_STEPS"
pretrain student "$run/corpus/train_tenth.jsonl" "$STUDENT_STEPS"

# The chain of the large recipes, with these settings.
TEACHER=$run/teacher STUDENT=$run/student DATA=$run/corpus/train_tenth.jsonl
# Learning rates: tide-bridge's and denoising's are each the best of those tried on the validation split.
release "${common[@]}" "${quiet_noise[@]}" --teacher-dtype fp32 --teacher-context staircase --distill-weight 4 --tidal off --no-compdemo \
  --lr 8e-3 --max-steps "$DISTILL_STEPS"

# The baselines: same initial weights, data and order of the data.
pair=(--student "$STUDENT" --teacher "$TEACHER") baseline=("${common[@]}" --teacher-dtype fp32 --lr 1e-3)
both=("${pair[@]}" --bridge "$run/bridge" --data "$run/data" "${baseline[@]}")
distil "$run/bd3lm" "${both[@]}" "${quiet_noise[@]}" --strategy bd3lm --max-steps "$DISTILL_STEPS"
distil "$run/bd3lm-short" "${both[@]}" "${quiet_noise[@]}" --strategy bd3lm --max-steps "$SHORT_STEPS"
# With the published noise, of which the teacher's answers are others.
STRATEGY=tide-cross teach "$run/tide-cross" "$run/cache-tide-cross" "$run/data" "${baseline[@]}" --max-steps "$DISTILL_STEPS"

completing=()
[[ $COMPLETIONS == 0 ]] || completing=(--completions "$COMPLETIONS" --completion-min-tokens 16 --completion-eos-in-order)
stage scores "$PYTHON" -m megatron_tide prepare --data "$run/corpus/$EVAL_SPLIT.jsonl" --student "$STUDENT" --teacher "$TEACHER" \
  --bridge "$run/bridge" --student-length "$STUDENT_LENGTH" --teacher-length "$TEACHER_LENGTH" --out "$run/$EVAL_SPLIT-data" \
  --then evaluate --data "$run/$EVAL_SPLIT-data" --samples "$EVAL_SAMPLES" ${completing[@]+"${completing[@]}"} --batch-size 16 \
  --student start="$STUDENT" --student "$run/bd3lm" --student "$run/bd3lm-short" --student "$run/tide-cross" \
  --student tide-bridge="$run/hf" --teacher "$TEACHER" --baseline start --baseline bd3lm --baseline bd3lm-short \
  --json "$run/scores.json" --card
stage inference-benchmark "$PYTHON" -m megatron_tide inference-benchmark --student "$run/hf" --teacher "$TEACHER" \
  --dtype float32 --new-tokens 96 --out "$run/inference_benchmark.json"
stage report "$PYTHON" -m megatron_tide report "$run"
[[ $DRY_RUN == 1 ]] || ! wanted report || "$PYTHON" recipes/quickstart/report.py "$run" --seed "$SEED"
