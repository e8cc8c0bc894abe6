"""In place of the worker of benchmarks/gpu.py: stages that end in every way a stage can, without torch.

Its argument says how; the settings come as a line, as they do to the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    how = sys.argv[1]
    if how == "dies early":
        return 3
    told = json.loads(sys.stdin.readline())
    figures = {"limits": told["limits"]}
    Path(told["out"]).write_text(json.dumps({**figures, **({"failed": {"half": "why"}} if how == "in parts" else {})}))
    if how == "faults":
        os.abort()
    if how == "overruns":  # with a process that it started
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(told["folder"], "..", "child").write_text(str(child.pid))
        print("still here", flush=True)
        time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
