# shellcheck shell=bash
# Shared by the scripts in this folder: one Slurm job that runs one recipe, saves when it must stop, and resumes.
# Source it from the repository's folder and call `job recipes/NAME.sh FLAGS...`.
#
# The batch script runs the recipe once, on the first node; only training runs on all nodes, through srun. Settings are
# environment variables: those of the recipe, and
#   MAX_ATTEMPTS  maximum number of starts of one job, the first included; after that it fails instead of being requeued
#   PROLOGUE      file to source first, for this cluster's modules, proxies and caches; see slurm/README.md
#   SRUN_FLAGS    more flags for srun, for example those of a container plugin

# shellcheck source=recipes/await.sh
source recipes/await.sh

unset CDPATH # CDPATH makes cd search other folders and print the result
set -eu # not pipefail: a reader of a log stops at the line it looks for, and the writer before it then "fails"
MAX_ATTEMPTS=${MAX_ATTEMPTS:-20}
RECIPE='' STOP_SIGNAL='' CHILD='' LOG='' NEXT='' RERUN='' REPORTED=''

fail() {
  REPORTED=1
  printf 'failed: %s\n' "$(shown "$*")"
  exit 2
}

check_numbers SLURM_RESTART_COUNT SLURM_JOB_ID SLURM_NNODES SLURM_JOB_START_TIME SLURM_JOB_END_TIME
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))

# The last line of the log always states the outcome, also if this script itself fails.
on_exit() {
  [[ -n $REPORTED ]] || printf 'failed: the job script stopped with status %s; next: fix the error above, then %s\n' "$1" "$RERUN"
}

# request_stop SIGNAL: Slurm wants the job to stop; forward it to the recipe. TERM overrides USR1: it comes last.
request_stop() {
  [[ $STOP_SIGNAL == TERM ]] || STOP_SIGNAL=$1
  [[ -z $CHILD ]] || kill -s "$1" "$CHILD" 2>/dev/null || true
}

open_log() {
  export NAME=${NAME:-$(basename "$RECIPE" .sh)} RUNS=${RUNS:-runs}
  export LOGS=$RUNS/$NAME/logs
  mkdir -p "$LOGS" || fail "cannot create $LOGS: RUNS must be a folder that all nodes can write to"
  LOG=$LOGS/$SLURM_JOB_ID.log
  printf 'everything is in %s\n' "$(cd "$LOGS" && pwd)/$SLURM_JOB_ID.log"
  exec >>"$LOG" 2>&1
  printf '== attempt %s of %s: job %s on %s, %s\n' "$ATTEMPT" "$MAX_ATTEMPTS" "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" \
    "$(date '+%F %T')"
}

prologue() {
  local file=${PROLOGUE:-slurm/cluster.sh}
  if [[ -e $file ]]; then
    set +eu # module scripts often fail under set -eu
    # shellcheck source=/dev/null
    source "$file"
    set -eu
  elif [[ -n ${PROLOGUE:-} ]]; then
    fail "PROLOGUE=$PROLOGUE: no such file (from $PWD)"
  fi
}

# rendezvous: export what torch and the recipe need to start the ranks of this allocation.
rendezvous() {
  local ranks=${SLURM_NTASKS_PER_NODE:-} gpus=${SLURM_GPUS_ON_NODE:-0}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "number of ranks per node unknown; next: sbatch --ntasks-per-node=8 ..."
  [[ ! $gpus =~ ^[1-9][0-9]*$ ]] || ((ranks <= gpus)) ||
    fail "$ranks ranks but $gpus GPUs per node; next: sbatch --ntasks-per-node=$gpus --gpus-per-node=$gpus ..."
  export LAUNCHER=srun NPROC=$ranks NNODES=$SLURM_NNODES
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [[ -n $MASTER_ADDR ]] || fail "scontrol finds no host in '$SLURM_JOB_NODELIST'; next: $RERUN, or ask the cluster's administrator"
  ((SLURM_NNODES > 1)) || MASTER_ADDR=127.0.0.1 # then training does not listen on the network (megatron_tide/train/network.py)
  export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # two jobs on one node use different ports
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it from sbatch
}

# run_recipe FLAGS...: run the recipe in the background, so that signals are handled at once; returns its status.
run_recipe() {
  local status=0
  bash "$RECIPE" "$@" </dev/null &
  CHILD=$!
  [[ -z $STOP_SIGNAL ]] || request_stop "$STOP_SIGNAL" # the signal arrived before CHILD was set
  await "$CHILD" || status=$?
  CHILD=''
  return "$status"
}

# this_attempt FILE: its lines since the last "== attempt" line.
this_attempt() { tac "$1" | sed '/^== attempt /q' | tac; }

# last_error FILE: its last error line: of one of our commands, or the end of a traceback.
last_error() {
  local line
  line=$(this_attempt "$1" | grep -E '^error: ' | grep -vE '^error: stage .* stopped with status' | tail -n 1)
  [[ -n $line ]] || line=$(this_attempt "$1" | grep -E '^[A-Za-z_.]+(Error|Exception|Interrupt)(:|$)' | tail -n 1)
  printf '%s' "${line#error: }"
}

# reason STATUS: why the recipe failed, in one line. The first rank to exit is the cause; the others fail because of it.
reason() {
  local first rank log line
  first=$(this_attempt "$LOG" | grep -E '^srun: error: .*tasks? [0-9]' | head -n 1) || true
  rank=$(sed -nE 's/.*tasks? ([0-9]+).*/\1/p' <<<"$first")
  if [[ -n $rank && ! $first =~ "Exited with exit code" ]]; then
    printf 'rank %s was killed (%s): by hand, or out of memory' "$rank" "${first#srun: error: }"
    return
  fi
  for log in ${rank:+"$LOGS/$SLURM_JOB_ID.rank$rank.log"} "$LOG"; do
    [[ -e $log ]] || continue
    line=$(last_error "$log") || true
    if [[ -n $line ]]; then
      [[ $log == "$LOG" ]] || line+=" (rank $rank)"
      printf '%s' "$line"
      return
    fi
  done
  printf 'the recipe ended with status %s%s' "$1" "${first:+ (${first#srun: error: })}"
}

# node_is_lost: whether the first node can start a job step but all nodes together cannot. Training fails soon after a node
# does; Slurm notices only after its SlurmdTimeout, often 5 minutes: too late to requeue a job that has failed.
node_is_lost() {
  local probe=(timeout -k 5 60 srun --overlap)
  ((SLURM_NNODES > 1)) && "${probe[@]}" --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" true >/dev/null 2>&1 &&
    ! "${probe[@]}" --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" true >/dev/null 2>&1
}

# requeue STATUS WHY: put the job back into the queue, after preemption or the loss of a node.
requeue() {
  local answer
  REPORTED=1
  if ((ATTEMPT >= MAX_ATTEMPTS)); then
    printf 'failed: %s at attempt %s (MAX_ATTEMPTS=%s), %s; next: %s\n' "$2" "$ATTEMPT" "$MAX_ATTEMPTS" "$(saved)" "$RERUN"
    exit "$1"
  fi
  trap '' TERM USR1 # Slurm ends a job before it requeues it; the last line is already printed
  printf '%s: %s and requeued (attempt %s of %s)\n' "$2" "$(saved)" "$ATTEMPT" "$MAX_ATTEMPTS"
  if ! answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && [[ $answer != *"pending execution"* ]]; then # Slurm requeued it first
    printf 'failed: %s, and not requeued: %s; next: %s\n' "$2" "$answer" "$RERUN"
    exit "$1"
  fi
  exit 0
}

# saved: whether training wrote a checkpoint when it stopped. Earlier stages keep their finished work in any case.
saved() {
  if this_attempt "$LOG" | grep -q 'stopped on request, checkpoint saved'; then
    printf 'saved'
  else
    printf 'nothing new to save'
  fi
}

# conclude STATUS: print the last line of the log, exactly one, and exit with the job's status.
conclude() {
  local status=$1 run=$RUNS/$NAME lost rest="convert report"
  REPORTED=1
  if ((status == 0)); then
    case " ${ONLY:-convert} " in
      *" convert "*)
        printf 'finished: %s; next: %s -m megatron_tide generate %s --prompt "..."\n' "$run/hf" "${PYTHON:-.venv/bin/python}" "$run/hf"
        ;;
      *" train "*)
        [[ -z ${EVAL_DATA:-} ]] || ! grep -q EVAL_DATA "$RECIPE" || rest="convert evaluate report"
        printf 'finished: %s in %s; next: ONLY="%s" %s, if it is not queued yet\n' "$ONLY" "$run" "$rest" "$NEXT"
        ;;
      *) printf 'finished: %s in %s; next, for the other stages: %s, if it is not queued yet\n' "$ONLY" "$run" "$NEXT" ;;
    esac
    exit 0
  fi
  # The check takes seconds; meanwhile Slurm may notice by itself and send TERM.
  [[ -n $STOP_SIGNAL ]] || ((status == 2)) || ! node_is_lost || requeue "$status" "lost a node"
  case $STOP_SIGNAL in
    TERM)
      lost=$(this_attempt "$LOG" | sed -nE 's/^srun: error: (Node failure on .*)/\1, /p' | head -n 1)
      printf 'cancelled: %s%s; next: %s (or wait, if Slurm itself requeues it)\n' "$lost" "$(saved)" "$RERUN"
      exit $((status == 130 ? 143 : status))
      ;;
    USR1) ! ((status == 130 || status == 138)) || requeue 130 preempted ;; # 138: stopped before there was anything to save
  esac
  printf 'failed: %s; next: fix that, then %s\n' "$(reason "$status")" "$RERUN"
  exit "$status"
}

# options SCRIPT [NAME]: the options of sbatch in which this job differs from SCRIPT's own, so that RERUN submits the same
# job; or this one of them. NEXT, for other stages, has not those of this job's nodes.
options() {
  local pair name value own days hours minutes
  for pair in nodes=SLURM_JOB_NUM_NODES ntasks-per-node=SLURM_NTASKS_PER_NODE gpus-per-node=SLURM_GPUS_PER_NODE \
    cpus-per-task=SLURM_CPUS_PER_TASK mem=SLURM_MEM_PER_NODE account=SLURM_JOB_ACCOUNT partition=SLURM_JOB_PARTITION qos=SLURM_JOB_QOS \
    reservation=SLURM_JOB_RESERVATION; do
    name=${pair%%=*} value=${pair#*=}
    [[ -z ${2:-} || $name == "$2" ]] || continue
    value=${!value:-}
    own=$(sed -nE "s/^#SBATCH --$name=([^ ]*).*/\1/p" "$1")
    [[ $name != mem || $own != *G ]] || own=$((10#${own%G} * 1024)) # Slurm says MiB
    [[ -n $value && $value != "$own" && $value != "(null)" ]] || continue
    case $name in
      partition) ! scontrol show partition "$value" 2>/dev/null | grep -q 'Default=YES' || continue ;;
      qos) [[ $value != normal ]] || continue ;;
    esac
    printf ' --%s=%q' "$name" "$value"
  done
  if [[ -z ${2:-} && -n ${SLURM_JOB_START_TIME:-} && -n ${SLURM_JOB_END_TIME:-} ]]; then
    value=$(((SLURM_JOB_END_TIME - SLURM_JOB_START_TIME + 30) / 60))
    own=$(sed -nE 's/^#SBATCH --time=(([0-9]+)-)?([0-9]+):([0-9]+):[0-9]+.*/\2 \3 \4/p' "$1")
    read -r days hours minutes <<<"${own/# /0 }"
    ((value == (10#$days * 24 + 10#$hours) * 60 + 10#$minutes)) || printf ' --time=%s' "$value"
  fi
}

# job RECIPE FLAGS...
job() {
  local status=0 settings script
  RECIPE=$1 script=slurm/$(basename "$1")
  shift
  settings=$(settings_of "$RECIPE" recipes/common.sh slurm/job.sh slurm/srun.sh)
  NEXT="${settings}sbatch$(options "$script" account) $script$( (($# == 0)) || printf ' %q' "$@")"
  RERUN="${settings}${ONLY:+ONLY=$(printf '%q' "$ONLY") }sbatch$(options "$script") $script$( (($# == 0)) || printf ' %q' "$@")"
  export TIDE_AGAIN=$RERUN
  check_names
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job; next: $RERUN, or without Slurm: bash $RECIPE"
  trap 'request_stop USR1' USR1
  trap 'request_stop TERM' TERM
  trap 'on_exit $?' EXIT
  open_log
  [[ $MAX_ATTEMPTS =~ ^[1-9][0-9]*$ ]] || fail "MAX_ATTEMPTS=$MAX_ATTEMPTS: must be a positive integer; next: set one, or unset it"
  prologue
  rendezvous
  run_recipe "$@" || status=$?
  conclude "$status"
}
