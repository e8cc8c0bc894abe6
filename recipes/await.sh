# shellcheck shell=bash
# For scripts that forward signals to a background command and need its exit status, and say how to go on.

# await PID: wait for a child of this shell and return its exit status; traps run within 0.1 s.
# `wait` alone is not enough: a trapped signal interrupts it, and bash loses the status (returns 255) if the child ends at
# that moment. A foreground command is not interrupted, and bash records how its other children end meanwhile.
await() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.1 || true; done
  wait "$1"
}

# settings_of FILE...: the exported variables that these scripts read as settings, as words in front of a command. Not
# those of the shell or of the machine.
settings_of() {
  local name settings=''
  for name in $(grep -ohE '\$\{[A-Z][A-Z0-9_]*:-' "$@" | tr -cd 'A-Z0-9_\n' | sort -u); do
    case $name in
      DRY_RUN | ONLY | LAUNCHER | NNODES | SLURM_* | *_DIR | MPLCONFIGDIR | OMP_NUM_THREADS | PYTHON?* | PYTORCH_* | TORCH_* | TIDE_*) continue ;;
    esac
    [[ -z ${!name:-} || $(declare -p "$name") != "declare -x"* ]] || settings+="$name=$(printf '%q' "${!name}") "
  done
  printf '%s' "$settings"
}
