# shellcheck shell=bash
# What every script in this folder shares: one Slurm job that runs one recipe, saves when it must stop, and goes on.
# Sourced, from the repository's folder; `job recipes/NAME.sh FLAGS...` does all of it.
#
# The batch script runs the recipe once, on the first node; training alone goes to all nodes, through srun. Settings come
# from the environment, the recipe's and these:
#   MAX_ATTEMPTS  how often one job may start, the first time included; then it fails instead of coming back
#   PROLOGUE      a file sourced first, for what this cluster needs (modules, proxies, caches); see slurm/README.md
#   SRUN_FLAGS    more flags for srun, such as those of a container plugin

# shellcheck source=recipes/await.sh
source recipes/await.sh

unset CDPATH # cd would look elsewhere first, and print where it went
set -eu # not pipefail: what reads a log stops at the line it looks for, and the writer before it then "fails"
MAX_ATTEMPTS=${MAX_ATTEMPTS:-20}
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))
RECIPE='' ASKED='' CHILD='' LOG='' AGAIN='' TOLD=''

fail() {
  TOLD=1
  local LC_ALL=C text="failed: $*" # a terminal acts on nothing in it
  printf '%s\n' "${text//[[:cntrl:]]/?}"
  exit 2
}

# However this script ends, its last line says so.
at_the_end() {
  [[ -n $TOLD ]] || printf 'failed: the job script itself stopped, with status %s; next: fix what is above, then %s\n' "$1" "$AGAIN"
}

# asked SIGNAL: by Slurm, to stop; the recipe hands it on to what it runs. TERM weighs more: it comes last.
asked() {
  [[ $ASKED == TERM ]] || ASKED=$1
  [[ -z $CHILD ]] || kill -s "$1" "$CHILD" 2>/dev/null || true
}

open_log() {
  export NAME=${NAME:-$(basename "$RECIPE" .sh)} RUNS=${RUNS:-runs}
  export LOGS=$RUNS/$NAME/logs
  mkdir -p "$LOGS" || fail "cannot make $LOGS: RUNS must be a folder that every node can write to"
  LOG=$LOGS/$SLURM_JOB_ID.log
  printf 'everything is in %s\n' "$(cd "$LOGS" && pwd)/$SLURM_JOB_ID.log"
  exec >>"$LOG" 2>&1
  printf '== attempt %s of %s: job %s on %s, %s\n' "$ATTEMPT" "$MAX_ATTEMPTS" "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" \
    "$(date '+%F %T')"
}

prologue() {
  local file=${PROLOGUE:-slurm/cluster.sh}
  if [[ -e $file ]]; then
    set +eu # files that load modules rarely are this strict
    # shellcheck source=/dev/null
    source "$file"
    set -eu
  elif [[ -n ${PROLOGUE:-} ]]; then
    fail "PROLOGUE=$PROLOGUE: no such file (from $PWD)"
  fi
}

# rendezvous: what torch needs to know of the allocation, and the recipe of how to start ranks.
rendezvous() {
  local ranks=${SLURM_NTASKS_PER_NODE:-} gpus=${SLURM_GPUS_ON_NODE:-0}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "ranks a node are not known; next: sbatch --ntasks-per-node=8 ..."
  [[ ! $gpus =~ ^[1-9][0-9]*$ ]] || ((ranks <= gpus)) ||
    fail "$ranks ranks but $gpus GPUs a node; next: sbatch --ntasks-per-node=$gpus --gpus-per-node=$gpus ..."
  export LAUNCHER=srun NPROC=$ranks NNODES=$SLURM_NNODES
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [[ -n $MASTER_ADDR ]] || fail "scontrol names no host of '$SLURM_JOB_NODELIST'; next: $AGAIN, or ask who runs the cluster"
  ((SLURM_NNODES > 1)) || MASTER_ADDR=127.0.0.1 # then training listens on no network (megatron_tide/train/distributed.py)
  export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # two jobs that share a node do not meet
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it from sbatch
}

# run_recipe FLAGS...: its status. In the background, so that a signal is acted on at once.
run_recipe() {
  local status=0
  bash "$RECIPE" "$@" </dev/null &
  CHILD=$!
  [[ -z $ASKED ]] || asked "$ASKED" # it came before CHILD was set
  await "$CHILD" || status=$?
  CHILD=''
  return "$status"
}

# this_attempt FILE: what it says since the last "== attempt" line.
this_attempt() { tac "$1" | sed '/^== attempt /q' | tac; }

# last_error FILE: the last line there that says what went wrong: of one of our commands, or the end of a traceback.
last_error() {
  local line
  line=$(this_attempt "$1" | grep -E '^error: ' | grep -vE '^error: stage .* stopped with status' | tail -n 1)
  [[ -n $line ]] || line=$(this_attempt "$1" | grep -E '^[A-Za-z_.]+(Error|Exception|Interrupt)(:|$)' | tail -n 1)
  printf '%s' "${line#error: }"
}

# reason STATUS: why the recipe failed, in one line. The rank that left first is the cause; the others only lost it.
reason() {
  local first rank log line
  first=$(this_attempt "$LOG" | grep -E '^srun: error: .*tasks? [0-9]' | head -n 1) || true
  rank=$(sed -nE 's/.*tasks? ([0-9]+).*/\1/p' <<<"$first")
  if [[ -n $rank && ! $first =~ "Exited with exit code" ]]; then
    printf 'rank %s was killed (%s): by hand, or for want of memory' "$rank" "${first#srun: error: }"
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

# a_node_is_lost: whether the first node still starts a step, and all of them together do not. Training ends soon after a
# node does, Slurm itself notices after its SlurmdTimeout, often 5 minutes: too late to requeue a job that has failed.
a_node_is_lost() {
  local probe=(timeout -k 5 60 srun --overlap)
  ((SLURM_NNODES > 1)) && "${probe[@]}" --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" true >/dev/null 2>&1 &&
    ! "${probe[@]}" --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" true >/dev/null 2>&1
}

# come_back STATUS WHY: the nodes are taken away, or one is lost; take the job's place in the queue again.
come_back() {
  local answer
  TOLD=1
  if ((ATTEMPT >= MAX_ATTEMPTS)); then
    printf 'failed: %s at attempt %s (MAX_ATTEMPTS=%s), %s; next: %s\n' "$2" "$ATTEMPT" "$MAX_ATTEMPTS" "$(saved)" "$AGAIN"
    exit "$1"
  fi
  trap '' TERM USR1 # a job that is requeued is ended first: the last line is then said
  printf '%s: %s and requeued (attempt %s of %s)\n' "$2" "$(saved)" "$ATTEMPT" "$MAX_ATTEMPTS"
  if ! answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && [[ $answer != *"pending execution"* ]]; then # Slurm was first
    printf 'failed: %s, and not requeued: %s; next: %s\n' "$2" "$answer" "$AGAIN"
    exit "$1"
  fi
  exit 0
}

# saved: whether training wrote a checkpoint as it stopped. Stages before it keep what they have finished, at any time.
saved() {
  if this_attempt "$LOG" | grep -q 'stopped as asked, saved'; then
    printf 'saved'
  else
    printf 'nothing new to save'
  fi
}

# conclude STATUS: the last line of the log, always one, and the job's status.
conclude() {
  local status=$1 run=$RUNS/$NAME lost
  TOLD=1
  if ((status == 0)); then
    case " ${ONLY:-convert} " in
      *" convert "*)
        printf 'finished: %s; next: %s -m megatron_tide generate %s --prompt "..."\n' "$run/hf" "${PYTHON:-.venv/bin/python}" "$run/hf"
        ;;
      *" train"*) printf 'finished: %s in %s; next: ONLY="convert report" %s, if it is not queued yet\n' "$ONLY" "$run" "$AGAIN" ;;
      *) printf 'finished: %s in %s; next: ONLY="train convert report" %s, if it is not queued yet\n' "$ONLY" "$run" "$AGAIN" ;;
    esac
    exit 0
  fi
  # Asking takes seconds, in which Slurm may have noticed by itself, and say so with TERM.
  [[ -n $ASKED ]] || ((status == 2)) || ! a_node_is_lost || come_back "$status" "lost a node"
  case $ASKED in
    TERM)
      lost=$(this_attempt "$LOG" | sed -nE 's/^srun: error: (Node failure on .*)/\1, /p' | head -n 1)
      printf 'cancelled: %s%s; next: %s (or wait, if Slurm itself requeues it)\n' "$lost" "$(saved)" "$AGAIN"
      exit $((status == 130 ? 143 : status))
      ;;
    USR1) ! ((status == 130 || status == 138)) || come_back 130 preempted ;; # 138: before it had anything to save
  esac
  printf 'failed: %s; next: fix that, then %s\n' "$(reason "$status")" "$AGAIN"
  exit "$status"
}

# job RECIPE FLAGS...
job() {
  local status=0
  RECIPE=$1
  shift
  AGAIN="sbatch slurm/$(basename "$RECIPE")$( (($# == 0)) || printf ' %q' "$@")"
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a script for Slurm; next: $AGAIN, or without Slurm: bash $RECIPE"
  trap 'asked USR1' USR1
  trap 'asked TERM' TERM
  trap 'at_the_end $?' EXIT
  open_log
  [[ $MAX_ATTEMPTS =~ ^[1-9][0-9]*$ ]] || fail "MAX_ATTEMPTS=$MAX_ATTEMPTS is no number of attempts; next: give one, or none"
  prologue
  rendezvous
  run_recipe "$@" || status=$?
  conclude "$status"
}
