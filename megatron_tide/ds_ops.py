"""Compile DeepSpeed's ops before they are needed, with a progress line.

DeepSpeed compiles an op on first use, silently and for minutes, and a killed build leaves a lock for which the next one
waits forever. An op that is already compiled is kept.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from megatron_tide.ds_config import use_own_ninja
from megatron_tide.files import create_new
from megatron_tide.lock import RunLock
from megatron_tide.screen import plain

YOUNG_SECONDS = 5  # more than the time between taking a lock and starting the compiler
BUILDERS = {
    "shared-memory communication": "ShareMemCommBuilder",
    "CPU Adam": "CPUAdamBuilder",
    "disk I/O": "AsyncIOBuilder",
}
# A tiny attention of the kind that training compiles: forward and backward.
TINY_ATTENTION = """
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
x = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
mask = create_block_mask(lambda n, head, q, k: q >= k, None, None, 128, 128)
torch.compile(flex_attention)(x, x, x, block_mask=mask).sum().backward()
torch.cuda.synchronize()
"""


def ops_folder() -> Path:
    """Where ops are compiled."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))


def clear_locks() -> None:
    """Remove the locks of processes that were killed while they compiled or loaded an op."""
    for lock in ops_folder().glob("**/lock"):
        clear(lock)


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
    needs = "g++, ninja and libaio-dev" if builder == "AsyncIOBuilder" else "g++ and ninja"
    compile_with(code, f"DeepSpeed's {title} op", needs, folder / f"{builder}.log")


def compile_with(code: str, title: str, needs: str, log: Path) -> None:
    """Run Python code that compiles something, in a child process, and show the elapsed time.

    Raises:
        ValueError: with the last line of the compiler.
    """
    started, built = time.monotonic(), set(log.parent.glob("*/*.so"))
    with os.fdopen(create_new(log), "w") as output:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            time.sleep(0.25)
            taken = time.monotonic() - started
            if taken > 5:  # an op that is already compiled loads faster
                line = f"   compiling {title}: {taken:3.0f} s (1 to 3 minutes, only once)"
                print(f"\r{line}" if sys.stdout.isatty() else "", end="", flush=True, file=plain(sys.stdout))
    if child.returncode:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise ValueError(f"{title} does not compile ({''.join(last)}); it needs {needs}; log: {log}")
    if set(log.parent.glob("*/*.so")) - built:
        text = f"\r   compiled {title} in {time.monotonic() - started:.0f} s" + " " * 20
        print(text, flush=True, file=plain(sys.stdout))


def refuse_missing_compiler() -> None:
    """What Triton needs on every GPU machine, before it fails in the middle of a step.

    Raises:
        ValueError: there is no C compiler, or Python's headers are missing.
    """
    asked = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([asked] if asked else ["gcc", "clang", "cc"])):
        found = f"CC={asked} is no program" if asked else "there is no C compiler"
        raise ValueError(f"{found}: Triton, which compiles attention on GPUs, needs one (apt-get install gcc)")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise ValueError(
            f"no Python.h in {headers}: Triton, which compiles attention on GPUs, needs Python's headers "
            "(apt-get install python3-dev, or the package of this Python)"
        )


def refuse_missing_disk_tools() -> None:
    """What DeepSpeed's disk op is compiled with, before a teacher is moved to the disk.

    Raises:
        ValueError: the headers of libaio are missing; or on a machine with GPUs the CUDA toolkit.
    """
    import torch

    if not any(ops_folder().glob("**/async_io/*.so")) and not _compiles("#include <libaio.h>"):
        raise ValueError("a teacher on disk needs the headers of libaio: apt-get install libaio-dev")
    if torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
            where = "CUDA_HOME is not set" if CUDA_HOME is None else f"there is no bin/nvcc in CUDA_HOME={CUDA_HOME}"
            raise ValueError(
                f"a teacher on disk needs the CUDA toolkit {torch.version.cuda} on this machine, and {where}: install "
                "it or load its module, or use --teacher-hosting zero3_cpu"
            )


def _compiles(source: str) -> bool:
    """Whether the C++ compiler takes a source, with the flags of the environment."""
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    command = [*shlex.split(os.environ.get("CXX", "g++")), *flags, "-E", "-x", "c++", "-"]
    try:
        return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0
    except OSError:
        return False


def build_ops(*, offload: bool, disk: bool) -> None:
    """Compile missing ops, in one process per machine at a time. ValueError if an op does not compile."""
    import torch

    cuda = torch.cuda.is_available()
    wanted = [] if cuda else ["shared-memory communication"]
    wanted += ["CPU Adam"] if offload else []
    wanted += ["disk I/O"] if disk else []
    if cuda:
        refuse_missing_compiler()
    if disk:
        refuse_missing_disk_tools()
    use_own_ninja()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder())))
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder, "build.lock", wait=True):
        clear_locks()
        for title in wanted:
            build(title, BUILDERS[title], folder)
        if cuda:
            _try_attention(folder)


def _try_attention(folder: Path) -> None:
    """Compile a tiny attention once for each torch and GPU: it finds what is missing before a teacher is loaded."""
    import torch

    card = torch.cuda.get_device_name().replace("/", " ")
    stamp = folder / f"attention, torch {torch.__version__}, {card}"
    if not stamp.exists():
        compile_with(
            TINY_ATTENTION,
            "attention",
            "a C compiler, and a GPU of compute capability 7 or more",
            folder / "attention.log",
        )
        stamp.touch()
