#!/usr/bin/env bash
# LLaDA2.0-mini (16B mixture of experts, own tokenizer) -> Qwen3-0.6B block diffusion student, TIDE-Cross.
#
# Output:    runs/distill_16b_to_0.6b/hf, a Hugging Face folder of the student, with a model card.
# Machine:   one GPU of 80 GB is enough (HOSTING=replicated: each GPU holds a bf16 copy of the teacher, 32.5 GB, and the student);
#            smaller GPUs: HOSTING=zero3, zero3_cpu, zero3_nvme or pipeline_8, see the table "Where the teacher lives" in README.md.
#            N GPUs are up to N times faster and give the same curve.
# Launch:    bash recipes/distill_16b_to_0.6b.sh                      all GPUs of this machine
#            NPROC=4 bash recipes/distill_16b_to_0.6b.sh              four of them
#            DRY_RUN=1 bash recipes/distill_16b_to_0.6b.sh            print the commands
#            ONLY="sample bridge data" bash recipes/distill_16b_to_0.6b.sh   only these stages, of: sample bridge data cache train convert report
#            sbatch slurm/distill_16b_to_0.6b.sh                    on a Slurm cluster
# Arguments are passed to the training:  ... --preset ours --max-steps 1000   (python -m megatron_tide.distill --help)
# If it stops for any reason, run the same command again: finished stages are skipped, training resumes from its checkpoint.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-distill_16b_to_0.6b}                                   # output folder: runs/NAME
TEACHER=${TEACHER:-inclusionAI/LLaDA2.0-mini}                       # hub name, or a folder in hub format
STUDENT=${STUDENT:-dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1}
DATA=${DATA:-recipes/mixtures/paper.json}                           # a mixture, or JSONL / Parquet / hub data sets
STRATEGY=${STRATEGY:-tide-cross}                                    # see the table in README.md
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
STUDENT_BLOCK=${STUDENT_BLOCK:-}                                    # block size to train the student with; empty: its own
TEACHER_LENGTH=${TEACHER_LENGTH:-1024}
HOSTING=${HOSTING:-}                                                # where the teacher's weights are (table in README.md); empty: replicated
TEACHER_NVME=${TEACHER_NVME:-}                                      # HOSTING=zero3_nvme: a folder on a fast local disk
CACHE=${CACHE:-0}                                                   # 1: a stage in which the teacher answers the whole training first (distributions: --teacher-top 64)
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}                           # 1: allow Python code from the hub repositories
# TEACHER_BLOCK, STUDENT_MASK, TEACHER_MASK, COVERAGE_FLOOR, RELEASE_DTYPE, EVAL_DATA: see common.sh
# NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see launcher() in common.sh
# ---

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment requirements.txt
# On one line, because bash reads a script while it runs it, and this file may be edited before the chain has finished.
chain "$@"; exit
