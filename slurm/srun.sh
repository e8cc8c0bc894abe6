# shellcheck shell=bash
# Starts ranks with Slurm: sourced by launcher() in recipes/common.sh if LAUNCHER=srun, which slurm/job.sh sets.

# launch_ranks RANKS: set LAUNCH to the srun command that starts RANKS ranks per node through rank.sh.
# After a stop signal, ranks exit with 130 one after the other: the first exit must not kill the others
# (--kill-on-bad-exit=0), but after a failed rank the others must not run on for long (--wait).
launch_ranks() {
  local flags=()
  read -ra flags <<<"${SRUN_FLAGS:-}"
  # shellcheck disable=SC2034 # common.sh reads it
  LAUNCH=(srun --nodes="${NNODES:-1}" --ntasks-per-node="$1" --kill-on-bad-exit=0 --wait=30
    ${flags[@]+"${flags[@]}"} bash slurm/rank.sh "$PYTHON")
}
