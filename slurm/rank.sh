#!/usr/bin/env bash
# One rank of a training run, started by srun (see slurm/srun.sh): rank.sh COMMAND...
# Says which rank it is in the words that torch reads, and keeps what it prints in $LOGS/<job>.rank<k>.log; rank 0 prints
# to the job's log as well.

set -euo pipefail
# shellcheck source=recipes/await.sh
source recipes/await.sh
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
log=${LOGS:?slurm/job.sh says where}/$SLURM_JOB_ID.rank$RANK.log
printf '== attempt %s: rank %s of %s on %s\n' "$((${SLURM_RESTART_COUNT:-0} + 1))" "$RANK" "$WORLD_SIZE" \
  "${SLURMD_NODENAME:-$(hostname)}" >>"$log"

if ((RANK > 0)); then
  exec "$@" >>"$log" 2>&1 # in place of this shell, so that signals reach it
fi

# Rank 0 prints to two places. Slurm kills what is left of a task when its first process ends: this shell therefore stays
# until `tee` has written the last line. Signals may come to every process of the task or to this one alone.
# A function, because bash reads a script as it goes, and this one may be edited while training runs.
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
