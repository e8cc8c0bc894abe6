"""DeepSpeed's compiled ops, built before they are needed, with a progress line.

DeepSpeed compiles an op when it is first used, silently and for minutes, and a build that was killed leaves a lock that
the next one waits on forever. An op that is built already is kept.
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

YOUNG_SECONDS = 5  # between taking a lock and starting the compiler pass fewer
BUILDERS = {
    "shared-memory communication": "ShareMemCommBuilder",
    "CPU Adam": "CPUAdamBuilder",
    "disk I/O": "AsyncIOBuilder",
}


def clear(lock: Path) -> None:
    """Remove the lock that a killed build left; wait for one that is held.

    Training takes it too, for a moment, when it loads an op that is built, and fails if it is gone.
    """
    with contextlib.suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < YOUNG_SECONDS or someone_works_in(lock.parent):
            time.sleep(0.1)
        lock.unlink()


def someone_works_in(folder: Path) -> bool:
    """Whether a process of this machine has ``folder`` as its working directory, as a compiler has."""
    wanted = folder.resolve()
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.readlink() == wanted:
                return True
    return False


def build(title: str, builder: str, folder: Path) -> None:
    """Build one op in a child process; say how long it takes while it does.

    Raises:
        ValueError: with the compiler's last words.
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
            if taken > 5:  # an op that is built already loads faster
                line = f"   compiling DeepSpeed's {title} op: {taken:3.0f} s (a minute or three, once)"
                print(f"\r{line}" if sys.stdout.isatty() else "", end="", flush=True)
    if child.returncode:
        needs = "g++, ninja and libaio-dev" if builder == "AsyncIOBuilder" else "g++ and ninja"
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise ValueError(f"DeepSpeed's {title} op does not build ({''.join(last)}); it needs {needs}; log: {log}")
    if set(folder.glob("*/*.so")) - built:
        print(f"\r   compiled DeepSpeed's {title} op in {time.monotonic() - started:.0f} s" + " " * 20, flush=True)


def build_ops(*, offload: bool, disk: bool) -> None:
    """Build what is missing, one process of this machine at a time. ValueError where an op does not compile."""
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
