#!/usr/bin/env bash
# The real sizes on a small machine: one optimizer step of the 16.256B teacher and the 0.596B student, without a GPU.
#
# You get:   runs/fullsize_cpu/report.json: seconds and bytes of every part, peak memory, against what this machine can
#            do (matmul rate, disk rate). It shows that hosting works at full size, not that a model gets better: the
#            weights are random, from a seed, in the true shapes (512 / 1024 tokens, CompDemo, two micro-batches a step).
# Machine:   2 cores, 24 GiB of memory, 45 GB of free disk that can read fast, g++ and libaio-dev; about 10 minutes.
# Launch:    bash recipes/fullsize_cpu_proof.sh                     run again, it starts the proof over
#            DISK=/local_nvme bash recipes/fullsize_cpu_proof.sh    where the teacher lies (default: the run folder)
#            DRY_RUN=1 bash recipes/fullsize_cpu_proof.sh           print the commands
# All large files are removed at the end, also when it is stopped.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-fullsize_cpu}
TEACHER_SHAPE=${TEACHER_SHAPE:-megatron_tide/models/configs/llada2_mini.json}
STUDENT_SHAPE=${STUDENT_SHAPE:-megatron_tide/models/configs/qwen3_0.6b.json}
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
TEACHER_LENGTH=${TEACHER_LENGTH:-1024}
ACCUMULATION=${ACCUMULATION:-2}           # micro-batches of one sample in the step
MEMORY_GIB=${MEMORY_GIB:-22}              # stop above this
SEED=${SEED:-42}
# ---

HOSTING=zero3_nvme
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
TEACHER_NVME=${DISK:-$run}/teacher-on-disk
setup_environment requirements.txt

[[ $DRY_RUN == 1 ]] || mkdir -p "$TEACHER_NVME"
[[ $DRY_RUN == 1 ]] || trap 'rm -rf "$TEACHER_NVME" "$run/student" "$run/teacher" "$run/trained"' EXIT

stage corpus "$PYTHON" recipes/fullsize/corpus.py --out "$run/corpus.jsonl"
# So few tokens for the teacher that it needs two for one of the student: both lengths are filled.
stage tokenizers "$PYTHON" -m megatron_tide train-tokenizers --data "$run/corpus.jsonl" --teacher-vocab 430 \
  --student-out "$run/tokenizers/student" --teacher-out "$run/tokenizers/teacher"
tokenizers=(--student "$run/tokenizers/student" --teacher "$run/tokenizers/teacher")
stage bridge "$PYTHON" -m megatron_tide bridge "${tokenizers[@]}" --sample "$run/corpus.jsonl" --out "$run/bridge"
stage data "$PYTHON" -m megatron_tide prepare --data "$run/corpus.jsonl" "${tokenizers[@]}" --bridge "$run/bridge" \
  --student-length "$STUDENT_LENGTH" --teacher-length "$TEACHER_LENGTH" --out "$run/data"

proof=("$PYTHON" recipes/fullsize/prove.py "$run" --teacher-shape "$TEACHER_SHAPE" --student-shape "$STUDENT_SHAPE"
  --accumulation "$ACCUMULATION" --memory-gib "$MEMORY_GIB" --seed "$SEED"
  --teacher-hosting "$HOSTING" --teacher-nvme "$TEACHER_NVME")
if [[ $DRY_RUN == 1 ]]; then printf '# proof\n%s\n' "${proof[*]}"; else "${proof[@]}"; fi
