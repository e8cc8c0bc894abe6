# shellcheck shell=bash
# What every recipe shares: set-up, stages, and the chain  bridge -> data -> distil -> convert.
# A recipe sets its knobs, sources this file and calls `chain`; this file is not run by itself.
#
# A stage is one command, run once (recipes/stage.py): it is skipped when the same command has finished before and no
# stage before it ran since. Stamps with command, seconds and peak memory are kept in $RUNS/$NAME/.stages.
# DRY_RUN=1 prints the commands instead.

set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$REPO"

export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH=$REPO
export TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore::FutureWarning # libraries talking about their next version
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$REPO/.venv/torch_extensions}
DRY_RUN=${DRY_RUN:-0}
RUNS=${RUNS:-runs} # everything a recipe makes goes to $RUNS/$NAME
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}
PYTHON=${PYTHON:-$REPO/.venv/bin/python} # another interpreter that has everything may be given; .venv is made here

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# setup_environment REQUIREMENTS...: a .venv with the requirement files named, and DeepSpeed's CPU op.
setup_environment() {
  [[ $DRY_RUN == 1 ]] && return 0
  if [[ $PYTHON == "$REPO/.venv/bin/python" ]]; then
    local files=("$@") stamp=$REPO/.venv/installed wanted file arguments=()
    wanted=$(cat "${files[@]}" | cksum)
    if ! grep -qsxF "$wanted" "$stamp"; then
      command -v python3 >/dev/null || fail "python3 not found: install Python 3.10 or newer"
      printf '== installing into .venv (once, a few minutes)\n'
      [[ -x $PYTHON ]] || python3 -m venv "$REPO/.venv" || fail "cannot make .venv: install the python3-venv package"
      # torch first: the pin takes this machine's build (CPU or CUDA), and what follows leaves it alone.
      "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
      for file in "${files[@]}"; do arguments+=(-r "$file"); done
      "$PYTHON" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
      "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
      printf '%s\n' "$wanted" >>"$stamp"
    fi
  fi
  local ops=(${BUILD_OPS[@]+"${BUILD_OPS[@]}"})
  [[ ${HOSTING:-} != *nvme ]] || ops+=(--disk)
  "$PYTHON" tools/build_ops.py ${ops[@]+"${ops[@]}"}
}

LAST_STAMP=
# stage NAME COMMAND...: run a command once, after the stages before it.
stage() {
  local stamp=$RUNS/$NAME/.stages/$1.json
  if [[ $DRY_RUN == 1 ]]; then
    printf '# %s\n' "$1"
    shift
    printf '%q ' "$@"
    printf '\n'
    return 0
  fi
  shift
  "$PYTHON" recipes/stage.py "$stamp" ${LAST_STAMP:+--after "$LAST_STAMP"} -- "$@" || exit $?
  LAST_STAMP=$stamp
}

# launcher RANKS: how to start a training run of that many ranks on this node, in the array LAUNCH.
# NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say so when there are several nodes.
launcher() {
  LAUNCH=("$PYTHON")
  if ((${NNODES:-1} > 1)); then
    LAUNCH+=(-m torch.distributed.run --nproc-per-node "$1" --nnodes "$NNODES" --node-rank "${NODE_RANK:?}"
      --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}")
  elif (($1 > 1)); then
    LAUNCH+=(-m torch.distributed.run --nproc-per-node "$1" --standalone)
  fi
}

# distil OUT FLAGS...: one training run as a stage named after its folder, on NPROC ranks (default: one a GPU).
distil() {
  local out=$1 gpus ranks
  shift
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  ranks=${NPROC:-$((gpus > 0 ? gpus : 1))}
  launcher "$ranks"
  if [[ $DRY_RUN != 1 ]] && ((${#LAUNCH[@]} > 1)); then # one clear line now, rather than one a rank later
    WORLD_SIZE=$((ranks * ${NNODES:-1})) "$PYTHON" -m megatron_tide.distill --out "$out" "$@" --dry-run >/dev/null || exit $?
  fi
  if ((gpus == 0)); then # torchrun would give every CPU rank one thread
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > ranks ? $(nproc) / ranks : 1))}
  fi
  stage "train-$(basename "$out")" "${LAUNCH[@]}" -m megatron_tide.distill --out "$out" "$@"
}

# hosting: the flags that HOSTING (a file ds_configs/teacher_$HOSTING.json, or "resident") and TEACHER_NVME stand for,
# in the array TEACHER_FLAGS.
hosting() {
  TEACHER_FLAGS=()
  [[ ${HOSTING:-resident} != resident ]] || return 0
  TEACHER_FLAGS=(--teacher-hosting "${HOSTING%%_*}" --teacher-deepspeed "ds_configs/teacher_$HOSTING.json")
  [[ -z ${TEACHER_NVME:-} ]] || TEACHER_FLAGS+=(--teacher-nvme "$TEACHER_NVME")
}

# chain [FLAGS...]: bridge -> data -> distil -> convert, from the knobs of the recipe; FLAGS go to the distillation.
chain() {
  local run=$RUNS/$NAME
  local pair=(--student "$STUDENT" --teacher "$TEACHER") masks=() trust=()
  [[ -z ${STUDENT_MASK:-} ]] || masks+=(--student-mask "$STUDENT_MASK")
  [[ -z ${TEACHER_MASK:-} ]] || masks+=(--teacher-mask "$TEACHER_MASK")
  ((TRUST_REMOTE_CODE == 0)) || trust=(--trust-remote-code)
  hosting
  local read=("${pair[@]}" ${masks[@]+"${masks[@]}"} ${trust[@]+"${trust[@]}"})

  stage sample "$PYTHON" -m megatron_tide.data.sample --data "$DATA" --out "$run/sample.jsonl"
  stage bridge "$PYTHON" -m megatron_tide.bridge "${read[@]}" --sample "$run/sample.jsonl" --out "$run/bridge"
  stage data "$PYTHON" -m megatron_tide.data.prepare --data "$DATA" "${read[@]}" --bridge "$run/bridge" \
    --student-length "$STUDENT_LENGTH" --teacher-length "$TEACHER_LENGTH" --out "$run/data"
  distil "$run/$STRATEGY" "${pair[@]}" ${trust[@]+"${trust[@]}"} --bridge "$run/bridge" --data "$run/data" \
    --strategy "$STRATEGY" ${TEACHER_FLAGS[@]+"${TEACHER_FLAGS[@]}"} "$@"
  stage convert "$PYTHON" tools/convert_to_hf.py "$run/$STRATEGY" "$run/hf" --overwrite
}
