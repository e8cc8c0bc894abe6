#!/usr/bin/env bash
# LLaDA2.0-mini (16B) -> Qwen3-0.6B on a Slurm cluster: bridge, data, distillation, Hugging Face folder, in one job.
#
#   sbatch slurm/distill_16b_to_0.6b.sh                                       from the repository's folder
#   STRATEGY=tide-bridge sbatch slurm/distill_16b_to_0.6b.sh --max-steps 1000 settings from the environment, flags to the training
#
# Everything is in runs/NAME/logs/<job>.log; its last line says how it ended and what to do next. A job whose time is up
# saves, goes back into the queue and goes on where it was. slurm/README.md: other clusters, several nodes, containers.
#
# Options on sbatch's own command line win over these. Uncomment what your cluster asks for:
##SBATCH --partition=gpu
##SBATCH --account=my_project

#SBATCH --job-name=distill_16b_to_0.6b
# Nodes, and on each of them one rank a GPU: change the three together. Any number of ranks gives the same curve.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# Processors of a rank, and the memory of a node. HOSTING=zero3_cpu keeps the teacher in it: 32.5 GB.
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
# As long as the queue gives you: the job comes back when it is over.
#SBATCH --time=12:00:00
# How long before that to save and leave: twice what one checkpoint takes. B: sends it to this script alone.
#SBATCH --signal=B:USR1@180
# A job that lost a node, or was preempted, comes back too, and goes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append

unset CDPATH # cd would look elsewhere first
cd "${SLURM_SUBMIT_DIR:-.}" && [[ -f slurm/job.sh ]] || {
  printf 'error: no slurm/job.sh in %s; submit from the repository: cd REPOSITORY && sbatch slurm/distill_16b_to_0.6b.sh\n' "$PWD" >&2
  exit 2
}
source slurm/job.sh
job recipes/distill_16b_to_0.6b.sh "$@"
