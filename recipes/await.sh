# shellcheck shell=bash
# For scripts that hand signals on to a command in the background and must know its status.

# await PID: wait until a child of this shell has ended, and give its status, while traps run within a tenth of a second.
# Not by `wait` alone: a trapped signal breaks it off, and bash loses the status (says 255) if the child ends just then.
# A command in the foreground is not broken off, and bash notes meanwhile how its other children ended.
await() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.1 || true; done
  wait "$1"
}
