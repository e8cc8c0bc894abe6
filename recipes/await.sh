# shellcheck shell=bash
# For scripts that forward signals to a background command and need its exit status.

# await PID: wait for a child of this shell and return its exit status; traps run within 0.1 s.
# `wait` alone is not enough: a trapped signal interrupts it, and bash loses the status (returns 255) if the child ends at
# that moment. A foreground command is not interrupted, and bash records how its other children end meanwhile.
await() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.1 || true; done
  wait "$1"
}
