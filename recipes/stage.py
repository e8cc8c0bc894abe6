"""Run one command of a recipe once, and keep what it took: `stage.py STAMP [--after STAMP] -- COMMAND...`

The stamp is written when the command succeeds. The stage is skipped when its stamp holds the same command and is not
older than the stamp of the stage before it; so an edited knob, or an earlier stage that ran again, runs it again.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


def read(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamp", help="file that records the finished stage")
    parser.add_argument("--after", default="", help="stamp of the stage before this one")
    arguments, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    name = Path(arguments.stamp).stem
    mine, before = read(arguments.stamp), read(arguments.after) if arguments.after else {}
    if mine.get("command") == command and mine.get("finished", 0) >= before.get("finished", 0):
        print(f"== {name}: done before, skipped", flush=True)
        return 0
    print(f"\n== {name}", flush=True)
    started = time.time()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command too, which saves what it has
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    finished = time.time()
    if status:
        status = 128 - status if status < 0 else status
        print(f"error: stage {name} stopped with status {status}; run the same recipe again to go on", file=sys.stderr)
        return status
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record = {"command": command, "finished": finished, "seconds": finished - started, "peak_process_bytes": peak}
    Path(arguments.stamp).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.stamp).write_text(json.dumps(record, indent=1))
    print(f"== {name}: {record['seconds']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
