#!/usr/bin/env bash
# The complete pipeline on this machine's CPU, on real data, from scratch: about 15 minutes on 2 cores, under 6 GiB.
#
#   corpus      docstring -> code pairs of this machine's own Python standard library, split by function
#   tokenizers  SentencePiece unigram for the teacher, byte-level BPE for the student, trained on the train split
#   models      a small llada2_moe teacher pretrained on all of the train split, a small BD3LM student on a tenth of it
#   chain       bridge -> aligned data -> distillation with TIDE-Cross -> Hugging Face folder   (as in the large recipes)
#   ablations   the denoising-only baseline, Reverse CALM with TIDAL as a weight, and tide-bridge: same start, steps, seeds
#   report      held-out bits per byte of all of them, three completions, memory and speed of student and teacher:
#               runs/quickstart/report.json and the page runs/quickstart/report/index.html
#
# Launch:  bash recipes/quickstart.sh            a second run skips finished stages; --fresh starts over
#          DRY_RUN=1 bash recipes/quickstart.sh  print the commands

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-quickstart}
TEACHER_STEPS=${TEACHER_STEPS:-1100}      # steps of pretraining of the teacher
STUDENT_STEPS=${STUDENT_STEPS:-500}       # steps of pretraining of the student, which all strategies start from
DISTILL_STEPS=${DISTILL_STEPS:-300}       # steps of each strategy
STUDENT_LENGTH=${STUDENT_LENGTH:-256}     # in tokens; longer responses are cut at a chunk boundary
TEACHER_LENGTH=${TEACHER_LENGTH:-256}
EVAL_SAMPLES=${EVAL_SAMPLES:-200}         # samples of the test split to score
SEED=${SEED:-42}
STRATEGY=tide-cross
# ---

# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
[[ ${1:-} == --fresh ]] && { [[ $DRY_RUN == 1 ]] || rm -rf "$run"; shift; }
(($# == 0)) || fail "unknown argument '$1': recipes/quickstart.sh takes only --fresh (settings: top of the file)"
setup_environment requirements.txt

common=(--precision fp32 --global-batch-size 8 --micro-batch-size 8 --beta2 0.98 --seed "$SEED" --save-every 200 --keep-last 1 --log-every 20)

# pretrain WHO CORPUS STEPS LR: train WHO from random weights by denoising only -> $run/WHO, a folder in hub format
pretrain() {
  local who=$1 corpus=$2 steps=$3 lr=$4
  stage "$who-init" "$PYTHON" -m megatron_tide init-model --config "recipes/quickstart/$who.json" \
    --tokenizer "$run/tokenizers/$who" --seed "$SEED" --out "$run/init/$who" --fresh
  stage "$who-data" "$PYTHON" -m megatron_tide prepare --data "$corpus" --student "$run/tokenizers/$who" \
    --student-length "$STUDENT_LENGTH" --out "$run/$who-data"
  distil "$run/$who-pretraining" --student "$run/init/$who" --data "$run/$who-data" --strategy bd3lm "${common[@]}" \
    --max-steps "$steps" --lr "$lr"
  stage "$who-convert" "$PYTHON" -m megatron_tide convert "$run/$who-pretraining" "$run/$who" --dtype float32 --overwrite
}

stage corpus "$PYTHON" -m megatron_tide corpus --out "$run/corpus"
stage tokenizers "$PYTHON" -m megatron_tide train-tokenizers --data "$run/corpus/train.jsonl" \
  --student-out "$run/tokenizers/student" --teacher-out "$run/tokenizers/teacher"
pretrain teacher "$run/corpus/train.jsonl" "$TEACHER_STEPS" 3e-3
pretrain student "$run/corpus/train_tenth.jsonl" "$STUDENT_STEPS" 3e-3

# The chain of the large recipes, with these settings.
TEACHER=$run/teacher STUDENT=$run/student DATA=$run/corpus/train_tenth.jsonl
distillation=("${common[@]}" --teacher-dtype fp32 --max-steps "$DISTILL_STEPS" --lr 1e-3)
release "${distillation[@]}"

# The ablations: same initial weights, data and noise.
both=(--student "$STUDENT" --teacher "$TEACHER" --bridge "$run/bridge" --data "$run/data" "${distillation[@]}")
distil "$run/bd3lm" "${both[@]}" --strategy bd3lm
distil "$run/tide-cross-tidal" "${both[@]}" --strategy tide-cross --tidal weight
distil "$run/tide-bridge" "${both[@]}" --strategy tide-bridge

stage completions "$PYTHON" -m megatron_tide generate "$run/hf" --file "$run/corpus/test.jsonl" --limit 3 --max-new-tokens 96 \
  --json "$run/completions.jsonl"
stage test-data "$PYTHON" -m megatron_tide prepare --data "$run/corpus/test.jsonl" --student "$STUDENT" \
  --teacher "$TEACHER" --bridge "$run/bridge" --student-length "$STUDENT_LENGTH" --teacher-length "$TEACHER_LENGTH" \
  --out "$run/test-data"
stage scores "$PYTHON" -m megatron_tide evaluate --data "$run/test-data" --samples "$EVAL_SAMPLES" --teacher "$TEACHER" \
  --student start="$STUDENT" --student "$run/bd3lm" --student tide-cross="$run/hf" --student "$run/tide-cross-tidal" \
  --student "$run/tide-bridge" --json "$run/scores.json" --card
stage inference-benchmark "$PYTHON" -m megatron_tide inference-benchmark --student "$run/hf" --teacher "$TEACHER" \
  --dtype float32 --new-tokens 96 --out "$run/inference_benchmark.json"
stage report "$PYTHON" -m megatron_tide report "$run"
[[ $DRY_RUN == 1 ]] || "$PYTHON" recipes/quickstart/report.py "$run" --seed "$SEED"
