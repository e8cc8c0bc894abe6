#!/usr/bin/env bash
# LLaDA2.0-mini (16B mixture of experts, own tokenizer) -> Qwen3-0.6B block diffusion student, TIDE-Cross.
#
# You get:   runs/distill_16b_to_0.6b/hf, a Hugging Face folder of the student, with a model card.
# Machine:   one GPU of 80 GB is enough (HOSTING=replicated: a bf16 copy of the teacher, 32.5 GB, beside the student on each);
#            smaller GPUs: HOSTING=zero3, zero3_cpu, zero3_nvme or pipeline_8, see "you have -> set this" in README.md.
#            N GPUs are up to N times faster and give the same curve.
# Launch:    bash recipes/distill_16b_to_0.6b.sh                      every GPU of this machine
#            NPROC=4 bash recipes/distill_16b_to_0.6b.sh              four of them
#            DRY_RUN=1 bash recipes/distill_16b_to_0.6b.sh            print the commands
#            ONLY="sample bridge data" bash recipes/distill_16b_to_0.6b.sh   some of the stages: sample bridge data train convert report
#            sbatch slurm/distill_16b_to_0.6b.sh                    on a Slurm cluster
# Arguments go to the distillation:  ... --preset ours --max-steps 1000   (python -m megatron_tide.distill --help)
# Stopped, by whatever? Run the same line again: finished stages are skipped, training goes on from its checkpoint.

set -euo pipefail
# --- settings: edit here, or set them in the environment ---
NAME=${NAME:-distill_16b_to_0.6b}                                   # everything goes to runs/NAME
TEACHER=${TEACHER:-inclusionAI/LLaDA2.0-mini}                       # hub name, or a folder in hub format
STUDENT=${STUDENT:-dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1}
DATA=${DATA:-recipes/mixtures/paper.json}                           # a mixture, or JSONL / Parquet / hub data sets
STRATEGY=${STRATEGY:-tide-cross}                                    # the table is in README.md
STUDENT_LENGTH=${STUDENT_LENGTH:-512}
TEACHER_LENGTH=${TEACHER_LENGTH:-1024}
HOSTING=${HOSTING:-}                                                # where the teacher's weights are (table in README.md); empty: replicated
TEACHER_NVME=${TEACHER_NVME:-}                                      # HOSTING=zero3_nvme: a folder on a fast local disk
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}                           # 1: run Python code that comes with the hub folders
# NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see launcher() in common.sh
# ---

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup_environment requirements.txt
# One line, because bash reads a script as it goes, and this one may have been edited by the time the chain is through.
chain "$@"; exit
