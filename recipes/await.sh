# shellcheck shell=bash
# For scripts that forward signals to a background command and need its exit status, check settings, and say how to go on.

# shown WORDS: on one line, with ? for what a terminal would act on, or hide: control characters (those of UTF-8 and single
# bytes too), marks of direction, characters without width.
shown() {
  printf '%s' "$(LC_ALL=C && printf '%s' "${*//[[:cntrl:]]/?}")" |
    LC_ALL=C sed -E -e $'s/\xc2[\x80-\x9f]|\xe2\x80[\x8b-\x8f\xa8-\xae]|\xe2\x81[\xa0-\xaf]|\xef\xbb\xbf/?/g' \
      -e $'s/(^|[\x01-\x7f]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})[\x80-\xbf]+/\\1?/g'
}

# check_names: NAME is a folder in RUNS, which --fresh removes; both, and ONLY, are printed.
check_names() {
  case ${NAME:-run} in
    . | .. | -* | */* | *[[:cntrl:]]*) fail "NAME=$NAME: must be the name of a folder in ${RUNS:-runs}, without / and not ." ;;
  esac
  local all="${RUNS:-} ${NAME:-} ${ONLY:-}"
  [[ ${RUNS:-} != -* && $(shown "$all") == "$all" ]] || fail "RUNS=${RUNS:-} NAME=${NAME:-} ONLY=${ONLY:-}: not names that can be shown"
}

# check_numbers NAME...: these settings are whole numbers, or not set. Others must not reach $((...)), where bash runs what
# stands in a[$(...)].
check_numbers() {
  local name
  for name in "$@"; do
    [[ ${!name:-0} =~ ^(0|[1-9][0-9]{0,17})$ ]] || fail "$name=${!name}: use a whole number"
  done
}

# await PID: wait for a child of this shell and return its exit status; traps run within 0.1 s.
# `wait` alone is not enough: a trapped signal interrupts it, and bash loses the status (returns 255) if the child ends at
# that moment. A foreground command is not interrupted, and bash records how its other children end meanwhile.
await() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.1 || true; done
  wait "$1"
}

# given NAME: whether this variable was exported, also if it is empty.
given() { [[ $(declare -p "$1" 2>/dev/null) == "declare -x"* ]]; }

# settings_of FILE...: the exported variables that these scripts read as settings, as words in front of a command. Not
# those of the shell or of the machine. Of ${NAME-default}, an empty one is a setting too.
settings_of() {
  local name form settings=''
  for form in $(grep -ohE '\$\{[A-Z][A-Z0-9_]*:?-' "$@" | tr -cd 'A-Z0-9_:\n' | sort -u); do
    name=${form%:}
    case $name in
      DRY_RUN | ONLY | LAUNCHER | NNODES | SLURM_* | *_DIR | MPLCONFIGDIR | OMP_NUM_THREADS | PYTHON?* | PYTORCH_* | TORCH_* | TIDE_*) continue ;;
    esac
    if [[ (-n ${!name:-} || $form != *:) && " $settings" != *" $name="* ]] && given "$name"; then
      settings+="$name=$(printf '%q' "${!name}") "
    fi
  done
  printf '%s' "$settings"
}
