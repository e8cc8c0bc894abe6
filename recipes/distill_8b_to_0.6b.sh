#!/usr/bin/env bash
# WeDLM-8B (dense, the student's own vocabulary) -> Qwen3-0.6B block diffusion student, TIDE-Shared.
#
# You get:   runs/distill_8b_to_0.6b/hf, a Hugging Face folder of the student, with a model card.
# Machine:   GPUs of 40 GB or more (every rank holds a bf16 copy of the teacher, 16.4 GB, beside the student); one is
#            enough, N are N times faster and give the same curve.
# Launch:    bash recipes/distill_8b_to_0.6b.sh                      every GPU of this machine
#            NPROC=4 bash recipes/distill_8b_to_0.6b.sh              four of them
#            DRY_RUN=1 bash recipes/distill_8b_to_0.6b.sh            print the commands
#            ONLY="sample bridge data" bash recipes/distill_8b_to_0.6b.sh   some of the stages: sample bridge data train convert report
#            sbatch slurm/distill_8b_to_0.6b.sh                    on a Slurm cluster
# Arguments go to the distillation:  ... --preset ours --max-steps 1000   (python -m megatron_tide.distill --help)
# Stopped, by whatever? Run the same line again: finished stages are skipped, training goes on from its checkpoint.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-distill_8b_to_0.6b}                                   # everything goes to runs/NAME
TEACHER=${TEACHER:-tencent/WeDLM-8B-Instruct}                       # hub name, or a folder in hub format
STUDENT=${STUDENT:-dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1}
DATA=${DATA:-recipes/mixtures/paper.json}                           # a mixture, or JSONL / Parquet / hub data sets
STRATEGY=${STRATEGY:-tide-shared}                                   # the table is in README.md
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
TEACHER_LENGTH=${TEACHER_LENGTH:-768}
TEACHER_MASK=${TEACHER_MASK:-151665}                                # its tokenizer names no mask token: the id
HOSTING=${HOSTING:-}                                                # where the teacher's weights are (table in README.md); empty: replicated
TEACHER_NVME=${TEACHER_NVME:-}                                      # HOSTING=zero3_nvme: a folder on a fast local disk
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}                           # 1: run Python code that comes with the hub folders
# NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see launcher() in common.sh
# ---

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment requirements.txt
# One line, because bash reads a script as it goes, and this one may have been edited by the time the chain is through.
chain "$@"; exit
