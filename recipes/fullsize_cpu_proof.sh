#!/usr/bin/env bash
# The real sizes on a small machine: one optimizer step of the 16.256B teacher and the 0.596B student, without a GPU.
#
# Output:    runs/fullsize_cpu/report.json: seconds and bytes of every part, peak memory, compared with this machine's
#            matmul rate and disk rate. It shows that hosting works at full size, not that a model improves: the
#            weights are random, from a seed, in the real shapes (512 / 1024 tokens, CompDemo, two micro-batches per step).
# Machine:   2 cores, 24 GiB of memory, 45 GB of free disk that can read fast, g++ and libaio-dev; about 10 minutes.
# Launch:    bash recipes/fullsize_cpu_proof.sh                     a second run starts over
#            DISK=/local_nvme bash recipes/fullsize_cpu_proof.sh    folder for the teacher's weights (default: the run folder)
#            DRY_RUN=1 bash recipes/fullsize_cpu_proof.sh           print the commands
# All large files are removed at the end, also after an interruption.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-fullsize_cpu}
TEACHER_SHAPE=${TEACHER_SHAPE:-megatron_tide/models/configs/llada2_mini.json}
STUDENT_SHAPE=${STUDENT_SHAPE:-megatron_tide/models/configs/qwen3_0.6b.json}
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
TEACHER_LENGTH=${TEACHER_LENGTH:-1024}
ACCUMULATION=${ACCUMULATION:-2}           # number of micro-batches (of one sample) in the step
MEMORY_GIB=${MEMORY_GIB:-22}              # abort above this memory use
SEED=${SEED:-42}
# ---

HOSTING=zero3_nvme
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run=$RUNS/$NAME
large=$run/fullsize # removed at the end, as is the teacher on the disk
TEACHER_NVME=${DISK:-$large}/teacher-on-disk-$NAME
setup_environment requirements.txt

[[ $DRY_RUN == 1 ]] || mkdir -p "$large" "$TEACHER_NVME"
[[ $DRY_RUN == 1 ]] || trap 'rm -rf "$TEACHER_NVME" "$large"' EXIT

stage corpus "$PYTHON" recipes/fullsize/corpus.py --out "$run/corpus.jsonl"
# The teacher's vocabulary is so small that it needs about two tokens per student token: both lengths are filled.
stage tokenizers "$PYTHON" -m megatron_tide train-tokenizers --data "$run/corpus.jsonl" --teacher-vocab 430 \
  --student-out "$run/tokenizers/student" --teacher-out "$run/tokenizers/teacher"
tokenizers=(--student "$run/tokenizers/student" --teacher "$run/tokenizers/teacher")
stage bridge "$PYTHON" -m megatron_tide bridge "${tokenizers[@]}" --sample "$run/corpus.jsonl" --out "$run/bridge"
stage data "$PYTHON" -m megatron_tide prepare --data "$run/corpus.jsonl" "${tokenizers[@]}" --bridge "$run/bridge" \
  --student-length "$STUDENT_LENGTH" --teacher-length "$TEACHER_LENGTH" --out "$run/data"

proof=("$PYTHON" recipes/fullsize/prove.py "$run" --teacher-shape "$TEACHER_SHAPE" --student-shape "$STUDENT_SHAPE"
  --accumulation "$ACCUMULATION" --memory-gib "$MEMORY_GIB" --seed "$SEED"
  --teacher-hosting "$HOSTING" --teacher-nvme "$TEACHER_NVME")
if [[ $DRY_RUN == 1 ]]; then printf '# proof\n%s\n' "$(printf '%q ' "${proof[@]}")"; else "${proof[@]}"; fi
