#!/usr/bin/env bash
# WeDLM-8B (dense, the student's own vocabulary) -> Qwen3-0.6B block diffusion student, TIDE-Shared.
#
# Output:    runs/distill_8b_to_0.6b/hf, a Hugging Face folder of the student, with a model card.
# Machine:   GPUs of 40 GB or more (each holds a bf16 copy of the teacher, 16.4 GB, and the student); one is
#            enough, N are N times faster and give the same curve.
# Launch:    bash recipes/distill_8b_to_0.6b.sh                      all GPUs of this machine
#            NPROC=4 bash recipes/distill_8b_to_0.6b.sh              four of them
#            DRY_RUN=1 bash recipes/distill_8b_to_0.6b.sh            print the commands
#            ONLY="sample bridge data" bash recipes/distill_8b_to_0.6b.sh   only these stages, of: sample bridge data cache train convert report
#            sbatch slurm/distill_8b_to_0.6b.sh                    on a Slurm cluster
# Arguments are passed to the training:  ... --preset ours --max-steps 1000   (python -m megatron_tide.distill --help)
# If it stops for any reason, run the same command again: finished stages are skipped, training resumes from its checkpoint.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-distill_8b_to_0.6b}                                   # output folder: runs/NAME
TEACHER=${TEACHER:-tencent/WeDLM-8B-Instruct}                       # hub name, or a folder in hub format
STUDENT=${STUDENT:-dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1}
DATA=${DATA:-recipes/mixtures/paper.json}                           # a mixture, or JSONL / Parquet / hub data sets
STRATEGY=${STRATEGY:-tide-shared}                                   # see the table in README.md
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
STUDENT_BLOCK=${STUDENT_BLOCK:-}                                    # block size to train the student with; empty: its own
TEACHER_LENGTH=${TEACHER_LENGTH:-768}
TEACHER_MASK=${TEACHER_MASK:-151665}                                # id of the mask token, which the tokenizer does not define
HOSTING=${HOSTING:-}                                                # where the teacher's weights are (table in README.md); empty: replicated
TEACHER_NVME=${TEACHER_NVME:-}                                      # HOSTING=zero3_nvme: a folder on a fast local disk
CACHE=${CACHE:-0}                                                   # 1: a stage in which the teacher answers the whole training first (distributions: --teacher-top 64)
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}                           # 1: allow Python code from the hub repositories
# TEACHER_BLOCK, STUDENT_MASK, COVERAGE_FLOOR, RELEASE_DTYPE, EVAL_DATA: see common.sh
# NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see launcher() in common.sh
# ---

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment requirements.txt
# On one line, because bash reads a script while it runs it, and this file may be edited before the chain has finished.
chain "$@"; exit
