# shellcheck shell=bash
# Shared by all recipes: setup, stages, and the chain  bridge -> data -> distil -> convert -> report.
# A recipe sets its variables, sources this file and calls `chain`. Do not run this file directly.
#
# A stage is one command, run once (recipes/stage.py): it is skipped when the same command has finished before, no stage
# before it ran since, and the files it read are as they were. Stamps with command, seconds and peak memory are kept in $RUNS/$NAME/.stages.
# DRY_RUN=1 prints the commands instead. ONLY="sample bridge data" runs those stages and skips the others ("train"
# means every train-*). LAUNCHER=srun starts the ranks with Slurm (slurm/job.sh sets it) instead of torchrun.
# Each stage says its place among all; a recipe that sets EXPECTED_SECONDS="NAME=SECONDS ...", measured on some machine,
# also gets the time left for the whole recipe.
# Ctrl-C, TERM and USR1 are forwarded to the running stage, which saves its state; the recipe then exits with status 130.

set -euo pipefail
unset CDPATH # CDPATH makes cd search other folders and print the result
RECIPE=$(realpath "$0" 2>/dev/null || true) RECIPE_ARGUMENTS=("$@")
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$REPO"
# shellcheck source=recipes/await.sh
source recipes/await.sh

export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH=$REPO
export TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore::FutureWarning # warnings of libraries about their next version
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$REPO/.venv/torch_extensions}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}} # of CUDA: less fragmentation
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$REPO/.venv/torchinductor} # torch's default is a folder in /tmp
export MPLCONFIGDIR=${MPLCONFIGDIR:-$REPO/.venv/matplotlib} # font cache here, not in the home folder
case ${DRY_RUN:-0} in # whatever is no clear "no" must not start hours of work, or remove a folder
  0 | false | no) DRY_RUN=0 ;;
  *) DRY_RUN=1 ;;
esac
RUNS=${RUNS:-runs} # all output of a recipe goes to $RUNS/$NAME
ONLY=${ONLY:-}
LAUNCHER=${LAUNCHER:-torchrun}
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}
CACHE=${CACHE:-0}
# Settings of a chain that its folders or the commands decide where they are empty: the teacher's block size, mask tokens,
# the least share of bytes in chunks, and the precision of the release.
TEACHER_BLOCK=${TEACHER_BLOCK:-} STUDENT_MASK=${STUDENT_MASK:-} TEACHER_MASK=${TEACHER_MASK:-}
COVERAGE_FLOOR=${COVERAGE_FLOOR:-} RELEASE_DTYPE=${RELEASE_DTYPE:-}
PYTHON=${PYTHON:-$REPO/.venv/bin/python} # or another interpreter with everything installed; the default .venv is created here

fail() {
  printf 'error: %s\n' "$(shown "$*")" >&2
  exit 2
}

check_names
check_numbers NPROC NNODES NODE_RANK MASTER_PORT

# again: the command that continues this recipe, with its settings, to paste into a shell.
again() {
  local one rest=()
  for one in ${RECIPE_ARGUMENTS[@]+"${RECIPE_ARGUMENTS[@]}"}; do [[ $one == --fresh ]] || rest+=("$one"); done
  settings_of "$RECIPE" recipes/common.sh
  for one in LAUNCHER NNODES NODE_RANK MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES; do # in a job: the allocation's
    ! given "$one" || printf '%s=%q ' "$one" "${!one}"
  done
  [[ -z $ONLY ]] || printf 'ONLY=%q ' "$ONLY"
  printf 'bash %q' "$(realpath --relative-to=. "$RECIPE")"
  ((${#rest[@]} == 0)) || printf ' %q' "${rest[@]}"
}

# switch NAME MEANING: set NAME to 0 or 1, as its word says; another word is refused.
switch() {
  case ${!1} in
    0 | false | no | "") printf -v "$1" 0 ;;
    1 | true | yes) printf -v "$1" 1 ;;
    *) fail "$1=${!1}: $2" ;;
  esac
}
switch TRUST_REMOTE_CODE "1 runs Python code that comes with the hub folders, 0 does not"
switch CACHE "1 asks the teacher before the training, in a stage of its own, 0 during it"

# setup_environment REQUIREMENTS...: create .venv, install the requirement files, and compile DeepSpeed's ops.
setup_environment() {
  [[ $DRY_RUN == 1 ]] && return 0
  if [[ $PYTHON == "$REPO/.venv/bin/python" ]]; then
    local files=("$@") stamp=$REPO/.venv/installed wanted others file arguments=()
    wanted=$(cksum "${files[@]}") # a line for each, of what it was when it was last installed
    if grep -qvxFf <(cat "$stamp" 2>/dev/null) <<<"$wanted"; then
      command -v python3 >/dev/null || fail "python3 not found: install Python 3.11 or newer"
      python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "python3 is $(python3 --version 2>&1): put Python 3.11 or newer first on PATH"
      printf '== installing into .venv (once, a few minutes)\n'
      [[ -x $PYTHON ]] || python3 -m venv "$REPO/.venv" || fail "cannot create .venv: install the python3-venv package"
      # torch first: the pin selects this machine's build (CPU or CUDA), and later installs keep it.
      "$PYTHON" -m pip install --no-compile --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
      for file in "${files[@]}"; do arguments+=(-r "$file"); done
      "$PYTHON" -m pip install --no-compile --quiet --disable-pip-version-check "${arguments[@]}"
      "$PYTHON" -m pip install --no-compile --quiet --disable-pip-version-check --no-deps --editable .
      # Python keeps what it compiles at the first import; where it may not, every process would compile torch again.
      if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
        "$PYTHON" -m compileall -q -j 0 "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
          >/dev/null 2>&1 || true # some packages ship files of other Pythons
      fi
      others=$(awk 'NR == FNR { mine[$3]; next } !($3 in mine)' <(printf '%s\n' "$wanted") "$stamp" 2>/dev/null || true)
      printf '%s\n' ${others:+"$others"} "$wanted" >"$stamp"
    fi
  fi
  local ops=(${BUILD_OPS[@]+"${BUILD_OPS[@]}"})
  [[ ${HOSTING:-} != *nvme ]] || ops+=(--disk)
  "$PYTHON" -m megatron_tide build-ops ${ops[@]+"${ops[@]}"}
}

# remove_run: for --fresh, remove the run's folder: one that a recipe wrote, and none uses now.
remove_run() {
  local run=$RUNS/$NAME
  [[ $DRY_RUN != 1 && -e $run ]] || return 0
  [[ -d $run/.stages || -z $(ls -A "$run") ]] ||
    fail "$run: no recipe's folder (it has no .stages), so --fresh does not remove it; set another NAME"
  "$PYTHON" -c 'import sys, pathlib, megatron_tide.lock as lock; sys.exit(lock.is_held(pathlib.Path(sys.argv[1])))' \
    "$run/.stages/.lock" || fail "$run: in use by another run; stop it first"
  rm -rf "$run"
}

# wanted STAGE: whether ONLY includes it. Matched words of ONLY are recorded, so that on_exit can report the others.
ONLY_SEEN=
wanted() {
  [[ -n $ONLY ]] || return 0
  local word
  for word in $ONLY; do
    if [[ $1 == "$word" || $1 == "$word"-* && $word == train ]]; then
      ONLY_SEEN+=" $word "
      return 0
    fi
  done
  return 1
}

on_exit() {
  local status=$? word
  ((status == 0)) || exit "$status"
  for word in $ONLY; do
    [[ $ONLY_SEEN == *" $word "* ]] || fail "ONLY=\"$ONLY\": this recipe has no stage '$word'; DRY_RUN=1 lists them"
  done
}
[[ -z $ONLY ]] || trap on_exit EXIT

STOP_SIGNAL='' CHILD=''
# request_stop SIGNAL: forward a stop signal to the running stage, and start no further stage.
request_stop() {
  STOP_SIGNAL=$1
  [[ -z $CHILD || $1 == INT ]] || kill -s "$1" "$CHILD" 2>/dev/null || true # a terminal sends INT to the stage itself
}

PLAN=
# plan: set PLAN to the names of the stages that this recipe runs, by a dry run of it; (NAME) is one that ONLY skips.
plan() {
  [[ -z $PLAN && -f $RECIPE ]] || return 0
  PLAN=$(DRY_RUN=1 bash "$RECIPE" ${RECIPE_ARGUMENTS[@]+"${RECIPE_ARGUMENTS[@]}"} 2>/dev/null | sed -nE 's/^# ([^ :]+)$/\1/p; s/^# ([^ :]+): skipped.*/(\1)/p' || true)
}

LAST_STAMP=
# stage NAME COMMAND...: run a command once; it runs again if an earlier stage has run since.
stage() {
  # shellcheck disable=SC2153 # NAME is the recipe's
  local stage=$1 stamp=$RUNS/$NAME/.stages/$1.json status=0
  shift
  if ! wanted "$stage"; then
    printf '# %s: skipped (ONLY="%s")\n' "$stage" "$ONLY"
    [[ ! -e $stamp ]] || LAST_STAMP=$stamp
    return 0
  fi
  if [[ $DRY_RUN == 1 ]]; then
    printf '# %s\n' "$stage"
    printf '%q ' "$@"
    printf '\n'
    return 0
  fi
  plan
  # In the background, because bash handles a signal only after the foreground command has ended. Before the first stage
  # there is nothing to save, and signals end the recipe at once.
  trap 'request_stop TERM' TERM
  trap 'request_stop USR1' USR1
  trap 'request_stop INT' INT
  [[ -z $STOP_SIGNAL ]] || exit 130
  "$PYTHON" recipes/stage.py "$stamp" ${LAST_STAMP:+--after "$LAST_STAMP"} --plan "$PLAN" \
    --expected "${EXPECTED_SECONDS:-}" --again "${TIDE_AGAIN:-$(again)}" -- "$@" <&0 &
  CHILD=$!
  [[ -z $STOP_SIGNAL ]] || request_stop "$STOP_SIGNAL" # the signal arrived before CHILD was set
  await "$CHILD" || status=$?
  CHILD=
  ((status == 0)) || exit "$status"
  LAST_STAMP=$stamp
}

# launcher RANKS: set LAUNCH to the command that starts RANKS ranks on every node.
# For several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.
launcher() {
  local torchrun=(-m torch.distributed.run --nproc-per-node "$1"
    --signals_to_handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1") # torchrun forwards each to the ranks, which save
  LAUNCH=("$PYTHON")
  case $LAUNCHER in
    torchrun)
      export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds for saving; torch's default is 30
      if ((${NNODES:-1} > 1)); then
        LAUNCH+=("${torchrun[@]}" --nnodes "$NNODES" --node-rank "${NODE_RANK:?}"
          --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}")
      elif (($1 > 1)); then
        # --standalone would listen on every network interface and unpickle what anyone writes there. Here the launcher
        # meets in a file of this user's, and rank 0 opens a port on 127.0.0.1 (megatron_tide/train/network.py).
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        LAUNCH+=("${torchrun[@]}" --rdzv-backend c10d --rdzv-conf store_type=file --local-addr 127.0.0.1)
      fi
      ;;
    *)
      if ! [[ $LAUNCHER =~ ^[a-z_]+$ ]] || ! grep -qs '^launch_ranks()' "slurm/$LAUNCHER.sh"; then
        fail "LAUNCHER=$LAUNCHER: use torchrun or srun"
      fi
      # shellcheck source=slurm/srun.sh
      source "slurm/$LAUNCHER.sh"
      launch_ranks "$1"
      ;;
  esac
}

# on_ranks STAGE MODULE FLAGS...: `python -m MODULE FLAGS` as a stage, on NPROC ranks (default: one per GPU, as many as divide
# the batch). MODULE may be two words.
on_ranks() {
  local title=$1 words=$2 module=() found gpus ranks
  read -ra module <<<"$words"
  shift 2
  if command -v "$PYTHON" >/dev/null; then
    found=$("$PYTHON" recipes/ranks.py "${NNODES:-1}" "$words" "$@") || exit $?
  else # a dry run before the installation
    found="0 1"
  fi
  read -r gpus ranks <<<"$found"
  ranks=${NPROC:-$ranks}
  launcher "$ranks"
  if [[ $DRY_RUN != 1 ]] && wanted "$title" && ((${#LAUNCH[@]} > 1)); then # report mistakes once here, not once per rank later
    WORLD_SIZE=$((ranks * ${NNODES:-1})) "$PYTHON" -m "${module[@]}" "$@" --dry-run >/dev/null || exit $?
  fi
  if ((gpus == 0)); then # torchrun would give every CPU rank one thread
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
  fi
  stage "$title" "${LAUNCH[@]}" -m "${module[@]}" "$@"
}

# distil OUT FLAGS...: one training run as stage train-<folder name>.
distil() {
  local out=$1
  shift
  on_ranks "train-$(basename "$out")" megatron_tide.distill --out "$out" "$@"
}

# chain [FLAGS...]: release, then report.
chain() {
  release "$@"
  stage report "$PYTHON" -m megatron_tide report "$RUNS/$NAME"
}

# read_settings: set pair, trust, read (how the tools read both models), hosting and floor, which the caller declares, from
# the settings of the recipe.
read_settings() {
  pair=(--student "$STUDENT" --teacher "$TEACHER")
  trust=()
  ((TRUST_REMOTE_CODE == 0)) || trust=(--trust-remote-code)
  read=("${pair[@]}" ${STUDENT_MASK:+--student-mask "$STUDENT_MASK"} ${TEACHER_MASK:+--teacher-mask "$TEACHER_MASK"}
    ${trust[@]+"${trust[@]}"})
  hosting=(${HOSTING:+--teacher-hosting "$HOSTING"} ${TEACHER_NVME:+--teacher-nvme "$TEACHER_NVME"})
  floor=(${COVERAGE_FLOOR:+--coverage-floor "$COVERAGE_FLOOR"})
}

# build_bridge: a sample of DATA -> the bridge of both tokenizers.
build_bridge() {
  stage sample "$PYTHON" -m megatron_tide sample --data "$DATA" --out "$run/sample.jsonl"
  stage bridge "$PYTHON" -m megatron_tide bridge "${read[@]}" --sample "$run/sample.jsonl" --out "$run/bridge" \
    ${floor[@]+"${floor[@]}"}
}

# prepare_pair TITLE SOURCE OUT: SOURCE as training data of both models.
prepare_pair() {
  stage "$1" "$PYTHON" -m megatron_tide prepare --data "$2" "${read[@]}" --bridge "$run/bridge" \
    --student-length "$STUDENT_LENGTH" --teacher-length "$TEACHER_LENGTH" --out "$3" \
    ${STUDENT_BLOCK:+--student-block "$STUDENT_BLOCK"} ${TEACHER_BLOCK:+--teacher-block "$TEACHER_BLOCK"} ${floor[@]+"${floor[@]}"}
}

# teach OUT CACHE DATA FLAGS...: one distillation, as distil; with CACHE=1 the teacher answers it first, into the folder
# CACHE, as a stage of that name, and the training needs no file of the teacher's.
teach() {
  local out=$1 answers=$2 prepared=$3 named=("${pair[@]}") hosted=(${hosting[@]+"${hosting[@]}"})
  shift 3
  local training=(${trust[@]+"${trust[@]}"} --bridge "$run/bridge" --data "$prepared" --strategy "$STRATEGY")
  if [[ $CACHE == 1 ]]; then
    on_ranks "$(basename "$answers")" "megatron_tide cache" --out "$answers" "${named[@]}" "${training[@]}" \
      ${hosted[@]+"${hosted[@]}"} "$@"
    named=(--student "$STUDENT")
    hosted=(--teacher-hosting cached --teacher-cache "$answers")
  fi
  distil "$out" "${named[@]}" "${training[@]}" ${hosted[@]+"${hosted[@]}"} "$@"
}

# export_hf TRAINED OUT: its newest checkpoint as a Hugging Face folder.
export_hf() {
  stage convert "$PYTHON" -m megatron_tide convert "$1" "$2" --overwrite ${RELEASE_DTYPE:+--dtype "$RELEASE_DTYPE"}
}

# release [FLAGS...]: bridge -> data (-> cache) -> distil -> convert (-> evaluate on EVAL_DATA), with the settings of the
# recipe; FLAGS are passed to distil. CACHE=1: the teacher answers the whole training first, as a stage of its own.
release() {
  local run=$RUNS/$NAME pair trust read hosting floor
  read_settings
  build_bridge
  prepare_pair data "$DATA" "$run/data"
  teach "$run/$STRATEGY" "$run/cache" "$run/data" "$@"
  export_hf "$run/$STRATEGY" "$run/hf"
  [[ -n ${EVAL_DATA:-} ]] || return 0 # prepared data that was not used for training
  stage evaluate "$PYTHON" -m megatron_tide evaluate --data "$EVAL_DATA" --student start="$STUDENT" --student distilled="$run/hf" \
    --json "$run/scores.json" --card
}

# adapt SOURCE RUN [FLAGS...]: an existing model -> a block diffusion student RUN/hf, trained by denoising only; with MASK_TOKEN,
# BLOCK, DATA and STUDENT_LENGTH of the recipe. FLAGS are passed to distil.
adapt() {
  local source=$1 run=$2
  shift 2
  stage student "$PYTHON" -m megatron_tide init-model --from "$source" ${BLOCK:+--block-size "$BLOCK"} \
    ${MASK_TOKEN:+--mask-token "$MASK_TOKEN"} --out "$run/student" --fresh
  stage data "$PYTHON" -m megatron_tide prepare --data "$DATA" --student "$run/student" --student-length "$STUDENT_LENGTH" \
    --out "$run/data"
  distil "$run/adaptation" --student "$run/student" --data "$run/data" --strategy bd3lm "$@"
  export_hf "$run/adaptation" "$run/hf"
}
