#!/usr/bin/env bash
# One rank of a training run, started by srun (see slurm/srun.sh): rank.sh COMMAND...
# Sets the environment variables that torch reads (RANK, WORLD_SIZE, ...) and writes the output to
# $LOGS/<job>.rank<k>.log; rank 0 also prints to the job's log.

set -euo pipefail
# shellcheck source=recipes/await.sh
source recipes/await.sh
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
log=${LOGS:?is set by slurm/job.sh}/$SLURM_JOB_ID.rank$RANK.log
printf '== attempt %s: rank %s of %s on %s\n' "$((${SLURM_RESTART_COUNT:-0} + 1))" "$RANK" "$WORLD_SIZE" \
  "${SLURMD_NODENAME:-$(hostname)}" >>"$log"

if ((RANK > 0)); then
  exec "$@" >>"$log" 2>&1 # replaces this shell, so that signals reach the command
fi

# Rank 0 prints to two places. Slurm kills the rest of a task when its first process ends, so this shell stays until `tee`
# has written the last line. Signals may come to all processes of the task or only to this one.
# A function, because bash reads a script while it runs it, and this file may be edited during training.
rank_0() {
  local writer status=0
  exec 3> >(trap '' INT TERM USR1 && exec tee -a "$log")
  writer=$!
  child=
  trap 'pass_on TERM' TERM
  trap 'pass_on USR1' USR1
  trap : INT
  "$@" >&3 2>&1 3>&- &
  child=$!
  exec 3>&-
  await "$child" || status=$?
  await "$writer" || true
  exit "$status"
}

# shellcheck disable=SC2329 # traps call it
pass_on() { [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true; }

rank_0 "$@"
