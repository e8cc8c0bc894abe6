#!/usr/bin/env bash
# On-policy distillation on a Slurm cluster: bridge, rounds of answers, data and training, Hugging Face folder, in one job.
#
#   sbatch slurm/on_policy.sh                                       from the repository's folder
#   ROUNDS=8 ON_POLICY=1 sbatch slurm/on_policy.sh --lr 1e-5  settings: environment variables; flags: passed to the training
#
# The log is runs/NAME/logs/<job>.log; its last line gives the outcome and what to do next. At its time limit a job saves
# a checkpoint, is requeued and resumes. slurm/README.md: other clusters, several nodes, containers.
#
# Options on the sbatch command line take precedence over these. Uncomment what your cluster requires:
##SBATCH --partition=gpu
##SBATCH --account=my_project

#SBATCH --job-name=on_policy
# Nodes, and one rank per GPU on each node: change the three together. Any number of ranks gives the same curve.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# CPUs per rank, and memory per node. HOSTING=zero3_cpu keeps the teacher in that memory: 32.5 GB.
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
# The longest time that the queue allows: the job is requeued when it is over.
#SBATCH --time=12:00:00
# How many seconds before that to save and exit: twice the time of one checkpoint. B: signals only the batch script.
#SBATCH --signal=B:USR1@180
# A job that lost a node or was preempted is requeued too, and appends to the same log.
#SBATCH --requeue
#SBATCH --open-mode=append

unset CDPATH # CDPATH makes cd search other folders
cd "${SLURM_SUBMIT_DIR:-.}" && [[ -f slurm/job.sh ]] || {
  printf 'error: no slurm/job.sh in %s; submit from the repository: cd REPOSITORY && sbatch slurm/on_policy.sh\n' "$PWD" >&2
  exit 2
}
source slurm/job.sh
job recipes/on_policy.sh "$@"
