"""Compile DeepSpeed's ops before they are needed, with a progress line.

DeepSpeed compiles an op on first use, silently and for minutes, and a killed build leaves a lock for which the next one
waits forever. An op that is already compiled is kept.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_tide.ds_config import use_own_ninja
from megatron_tide.lock import RunLock

YOUNG_SECONDS = 5  # more than the time between taking a lock and starting the compiler
BUILDERS = {
    "shared-memory communication": "ShareMemCommBuilder",
    "CPU Adam": "CPUAdamBuilder",
    "disk I/O": "AsyncIOBuilder",
}


def clear(lock: Path) -> None:
    """Remove the lock that a killed build left; wait for one that is held.

    Training also takes the lock briefly when it loads a compiled op, and fails if the lock is removed.
    """
    with contextlib.suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < YOUNG_SECONDS or someone_works_in(lock.parent):
            time.sleep(0.1)
        lock.unlink()


def someone_works_in(folder: Path) -> bool:
    """Whether a process of this machine has ``folder`` as its working directory, like a compiler."""
    wanted = folder.resolve()
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.readlink() == wanted:
                return True
    return False


def build(title: str, builder: str, folder: Path) -> None:
    """Compile one op in a child process, and show the elapsed time.

    Raises:
        ValueError: with the last line of the compiler.
    """
    code = (
        "from deepspeed.accelerator import get_accelerator as a;"
        f"b = a().create_op_builder({builder!r}); b and b.load(verbose=False)"
    )
    log = folder / f"{builder}.log"
    started, built = time.monotonic(), set(folder.glob("*/*.so"))
    with log.open("w") as output:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            time.sleep(0.25)
            taken = time.monotonic() - started
            if taken > 5:  # an op that is already compiled loads faster
                line = f"   compiling DeepSpeed's {title} op: {taken:3.0f} s (1 to 3 minutes, only once)"
                print(f"\r{line}" if sys.stdout.isatty() else "", end="", flush=True)
    if child.returncode:
        needs = "g++, ninja and libaio-dev" if builder == "AsyncIOBuilder" else "g++ and ninja"
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise ValueError(f"DeepSpeed's {title} op does not compile ({''.join(last)}); it needs {needs}; log: {log}")
    if set(folder.glob("*/*.so")) - built:
        print(f"\r   compiled DeepSpeed's {title} op in {time.monotonic() - started:.0f} s" + " " * 20, flush=True)


def build_ops(*, offload: bool, disk: bool) -> None:
    """Compile missing ops, in one process per machine at a time. ValueError if an op does not compile."""
    import torch

    wanted = [] if torch.cuda.is_available() else ["shared-memory communication"]
    wanted += ["CPU Adam"] if offload else []
    wanted += ["disk I/O"] if disk else []
    use_own_ninja()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder, "build.lock", wait=True):
        for lock in folder.glob("*/lock"):
            clear(lock)
        for title in wanted:
            build(title, BUILDERS[title], folder)
