#!/usr/bin/env bash
# slurm/RECIPE.sh as three jobs (four with CACHE=1), each on the nodes it needs, each waiting for the previous one:
#   prepare  the stages before it (sample, bridge, data)     CPUs, no GPU
#   cache    with CACHE=1: the teacher's answers             the GPUs that slurm/RECIPE.sh requests
#   distil   the training                                    the same; with CACHE=1 it loads no teacher
#   convert  checkpoint -> Hugging Face folder, and a report  CPUs; with EVAL_DATA also scores, on one GPU
#
#   bash slurm/chain.sh distill_16b_to_0.6b --max-steps 1000           flags are passed to the training
#   DRY_RUN=1 bash slurm/chain.sh distill_16b_to_0.6b                  print the sbatch commands
#   PREPARE_SBATCH="--partition=cpu" bash slurm/chain.sh distill_16b_to_0.6b
#
# Settings, in addition to those of the recipe: PREPARE_SBATCH, CACHE_SBATCH, DISTIL_SBATCH, CONVERT_SBATCH (more options for
# each sbatch; they take precedence), EVAL_DATA (prepared data not used for training; its scores go to runs/NAME/scores.json).

set -euo pipefail
unset CDPATH # CDPATH makes cd search other folders
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=recipes/await.sh
source recipes/await.sh
case ${DRY_RUN:-0} in 0 | false | no) DRY_RUN=0 ;; *) DRY_RUN=1 ;; esac

fail() {
  printf 'error: %s\n' "$(shown "$*")" >&2
  exit 2
}
check_names

name=${1:-} JOBS=() TITLES=() COMPLETE=
[[ -n $name && -f slurm/$name.sh && -f recipes/$name.sh ]] ||
  fail "'$name': no such recipe in both recipes/ and slurm/; usage: bash slurm/chain.sh distill_16b_to_0.6b [FLAGS...]"
shift
flags=("$@")
[[ ${DRY_RUN:-0} == 1 ]] || command -v sbatch >/dev/null || fail "sbatch not found: run this on a login node of the cluster"
[[ -z ${EVAL_DATA:-} || -d ${EVAL_DATA:-} ]] || fail "EVAL_DATA=$EVAL_DATA: no such folder; create it with the prepare command"
if [[ -n ${ONLY:-} ]]; then fail "ONLY=\"$ONLY\": this script sets ONLY itself; to run only some stages: ONLY=... sbatch slurm/$name.sh"; fi

# If one job cannot be submitted, cancel those before it.
trap '[[ -n $COMPLETE ]] || ((${#JOBS[@]} == 0)) || scancel "${JOBS[@]}"' EXIT

# submit TITLE STAGES OPTIONS...: submit the job $name-TITLE for these stages, dependent on the previous job.
submit() {
  local only=$2 command id
  TITLES+=("$1")
  shift 2
  set -- --job-name="$name-${TITLES[-1]}" "$@"
  ((${#JOBS[@]} == 0)) || set -- "--dependency=afterok:${JOBS[-1]}" --kill-on-invalid-dep=yes "$@"
  command=(sbatch --parsable "$@" "slurm/$name.sh" ${flags[@]+"${flags[@]}"})
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf 'ONLY=%q' "$only"
    printf ' %q' "${command[@]}"
    printf '\n'
    JOBS+=("ID$((${#JOBS[@]} + 1))")
    return
  fi
  id=$(ONLY=$only "${command[@]}") || fail "sbatch refused the job for '$only'; its message is above"
  JOBS+=("${id%%;*}")
}

one_node=(--nodes=1 --ntasks-per-node=1 --cpus-per-task=16)
read -ra prepare <<<"${PREPARE_SBATCH:-}"
read -ra distil <<<"${DISTIL_SBATCH:-}"
read -ra convert <<<"${CONVERT_SBATCH:-}"
read -ra cache <<<"${CACHE_SBATCH:-}"
stages=$(DRY_RUN=1 bash "recipes/$name.sh" | sed -n 's/^# //p' | xargs)
[[ $stages != *" train-"*" train-"* ]] || fail "$name trains in rounds, each from the one before: one job, sbatch slurm/$name.sh"
before=${stages%% train-*} # the stages before the training
submit prepare "${before% cache}" "${one_node[@]}" --gpus-per-node=0 ${prepare[@]+"${prepare[@]}"}
[[ $before != *" cache" ]] || submit cache cache ${cache[@]+"${cache[@]}"}
submit distil train ${distil[@]+"${distil[@]}"}
if [[ -n ${EVAL_DATA:-} ]]; then
  submit convert "convert evaluate report" "${one_node[@]}" --gpus-per-node=1 ${convert[@]+"${convert[@]}"}
else
  submit convert "convert report" "${one_node[@]}" --gpus-per-node=0 ${convert[@]+"${convert[@]}"}
fi
COMPLETE=1
[[ ${DRY_RUN:-0} == 1 ]] && exit 0

jobs=
for number in "${!JOBS[@]}"; do jobs+="${jobs:+, }${TITLES[number]} ${JOBS[number]}"; done
printf '%s\n' "$jobs"
printf 'watch:  squeue --jobs=%s   tail -F %s/%s/logs/%s.log\n' "$(IFS=,; echo "${JOBS[*]}")" "${RUNS:-runs}" \
  "${NAME:-$name}" "${JOBS[0]}"
printf 'stop:   scancel %s\n' "${JOBS[*]}"
