# shellcheck shell=bash
# How ranks start with Slurm: sourced by launcher() in recipes/common.sh where LAUNCHER=srun, which slurm/job.sh sets.

# launch_ranks RANKS: that many on every node, each by way of rank.sh, in the array LAUNCH.
# Ranks that were asked to stop leave with 130 one after the other: the first must not have the others killed
# (--kill-on-bad-exit=0), but ranks that lost one of theirs for another reason must not stay for long (--wait).
launch_ranks() {
  local flags=()
  read -ra flags <<<"${SRUN_FLAGS:-}"
  # shellcheck disable=SC2034 # common.sh reads it
  LAUNCH=(srun --nodes="${NNODES:-1}" --ntasks-per-node="$1" --kill-on-bad-exit=0 --wait=30
    ${flags[@]+"${flags[@]}"} bash slurm/rank.sh "$PYTHON")
}
