"""Eight minutes on one GPU that say what is right and how fast it is; no network, no arguments needed.

    python -m benchmarks.gpu                         (or python benchmarks/gpu.py, from any folder)
    python -m benchmarks.gpu --stages a,e,h --out runs/gpu.json
    python -m benchmarks.gpu --tiny --device cpu     every stage's code at toy size, anywhere

  a  the card's own limits: matmul, memory, pinned copies    g  where a step waits for the device
  b  flex attention against the dense mask                   h  a full-size step, ours and the usual way: MFU, peak
  c  experts against a loop                                  i  the same step, each optimisation off alone
  d  the head against full logits                            j  generation: student, teacher, autoregressive
  e  training runs on NCCL against golden losses of a CPU    k  recipes/real_small.sh (--real-weights) in the time left
  f  a sharded and offloaded teacher against a replicated one

Each stage is a process of its own with a time limit: one that fails or overruns is recorded as such, with what it had
measured, and the next one goes on. The file is written after every stage. They run in the order a, d, c, h, e, g, b, j,
f, i, k, and the last ones take what time is left: give them a run of their own (--stages a,i). The others are compared
with the limits of a. benchmarks/gpu_wheels.sh collects what a machine without a network lacks. The status is 1 if a
stage failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # as `python benchmarks/gpu.py` Python looks for modules beside this file only
    sys.path.insert(0, str(REPOSITORY))

from megatron_tide import cli  # noqa: E402
from megatron_tide.files import read_json, write_json  # noqa: E402

LEFT = 15.0  # seconds: no stage starts with less
WORKER = ("-m", "benchmarks.gpu_stages.bench")
NO_GPU = "no GPU that torch can use: run this on a machine with one, or try the code with --tiny --device cpu"
NEEDED = ("torch", "deepspeed", "transformers", "safetensors", "pyarrow", "sentencepiece", "tokenizers")
NEEDED += ("tensorboard", "pytest")
LIBAIO = Path("/usr/include/libaio.h")


@dataclass(frozen=True)
class Stage:
    """``code``: "module:function" of the stage; ``seconds``: its limit."""

    letter: str
    title: str
    code: str
    seconds: float


_HERE = "benchmarks.gpu_stages"
# In the order in which they run: what the others are compared with, what is short, what is worth most, what can go on
# for long.
STAGES = (
    Stage("a", "limits of the card", f"{_HERE}.limits:run", 40),
    Stage("d", "head", f"{_HERE}.parts:head", 25),
    Stage("c", "experts", f"{_HERE}.parts:experts", 30),
    Stage("h", "a step at full size", f"{_HERE}.full_size:run", 170),
    Stage("e", "training runs on NCCL", f"{_HERE}.training:run", 110),
    Stage("g", "waits for the device", f"{_HERE}.waits:run", 50),
    Stage("b", "attention", f"{_HERE}.attention:run", 60),
    Stage("j", "generation", f"{_HERE}.generation:run", 60),
    Stage("f", "hostings of the teacher", f"{_HERE}.hostings:run", 45),
    Stage("i", "optimisations, each off alone", f"{_HERE}.switches:run", 200),
    Stage("k", "real weights", f"{_HERE}.real:run", 600),
)


class Worker:
    """A process that has imported a stage's code and waits for the word to begin."""

    def __init__(self, stage: Stage, folder: Path, device: str) -> None:
        self.stage, self.folder = stage, folder / stage.letter
        self.folder.mkdir(parents=True)
        self.log, self.figures = self.folder / "log", self.folder / "figures.json"
        environment = {**os.environ, "PYTHONPATH": _joined(str(REPOSITORY), os.environ.get("PYTHONPATH"))}
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        environment.setdefault("HF_HUB_OFFLINE", "1")
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, *WORKER, stage.code]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Let it begin; -> its record: status, seconds, what it measured, and its last words if it failed."""
        started = time.monotonic()
        told = {**settings, "folder": str(self.folder), "out": str(self.figures), "seconds": seconds}
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.write((json.dumps(told) + "\n").encode())
            self.process.stdin.flush()
        try:
            status = self.process.wait(seconds)
            said = "ok" if status == 0 else f"failed (status {status})"
        except subprocess.TimeoutExpired:
            status, said = -1, f"overran its {seconds:.0f} s"
        finally:  # also where this process is told to end
            self.end()
        figures = read_json(self.figures) if self.figures.exists() else {}
        if said == "ok" and figures.get("failed"):
            said = "failed in parts"
        record = {"title": self.stage.title, "status": said, "seconds": round(time.monotonic() - started, 2), **figures}
        return record if status == 0 else {**record, "log": self._last_words()}

    def end(self) -> None:
        """End it with all that it started, if it is still there."""
        _end_group(self.process)

    def _last_words(self, most: int = 4000) -> list[str]:
        return self.log.read_bytes()[-most:].decode(errors="replace").splitlines()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the rest of the group."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(path for path in paths if path)


@contextmanager
def started_early(stages: Sequence[Stage], folder: Path, device: str) -> Iterator[Iterator[Worker]]:
    """A worker of each stage in turn; the next one imports its libraries while one is at work."""
    waiting: list[Worker] = []

    def workers() -> Iterator[Worker]:
        for place in range(len(stages)):
            for stage in stages[place + len(waiting) : place + 2]:
                waiting.append(Worker(stage, folder, device))
            yield waiting.pop(0)

    try:
        yield workers()
    finally:
        for worker in waiting:
            worker.end()


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM is an interruption, after which no process is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stages(stages: Sequence[Stage], settings: dict[str, Any], out: Path, seconds: float) -> dict[str, Any]:
    """Run ``stages`` one after the other within ``seconds``; -> the record, which ``out`` holds after each."""
    started = time.monotonic()
    frame = {"benchmark": "gpu", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    record: dict[str, Any] = {**frame, "tiny": settings["tiny"], "device": settings["device"], "stages": {}}
    with (
        ended_in_order(),
        tempfile.TemporaryDirectory(prefix="gpu-") as folder,
        ops_built(Path(folder), settings["device"] == "cuda"),
        started_early(stages, Path(folder), settings["device"]) as workers,
    ):
        for worker in workers:
            stage, left = worker.stage, seconds - (time.monotonic() - started)
            if left < LEFT:
                worker.end()
                found: dict[str, Any] = {"title": stage.title, "status": "not run: no time left"}
            else:
                told = {**settings, "limits": record["stages"].get("a", {})}
                found = worker.run(told, left if settings["tiny"] else min(stage.seconds, left))
            record["stages"][stage.letter] = found
            record |= found.pop("frame", {})  # machine and versions, as a stage saw them
            record["seconds"] = round(time.monotonic() - started, 1)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, record)
            print(f"{stage.letter}  {stage.title:<30}  {found['status']}  {found.get('seconds', 0):.0f} s", flush=True)
    return record


def chosen(letters: str) -> list[Stage]:
    """The stages that ``--stages`` names, in the order in which they run."""
    wanted = [word.strip() for word in letters.split(",") if word.strip()]
    known = {stage.letter for stage in STAGES}
    if unknown := [word for word in wanted if word not in known]:
        raise ValueError(
            f"--stages {letters}: there is no stage {unknown[0]!r}; use letters of {','.join(sorted(known))}"
        )
    return [stage for stage in STAGES if not wanted or stage.letter in wanted]


@contextmanager
def ops_built(folder: Path, needed: bool) -> Iterator[None]:
    """Compile what DeepSpeed would compile in the middle of a stage, beside the first stages."""
    if not needed:
        yield
        return
    words = ["build-ops", "--offload", *(["--then", "build-ops", "--disk"] if LIBAIO.exists() else [])]
    command = [sys.executable, "-m", "megatron_tide", *words]
    with (folder / "build-ops.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        _end_group(process)


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="", metavar="a,b,...", help="only these (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tries the code, measures nothing")
    parser.add_argument("--seconds", type=float, default=470, help="for all stages together (default: %(default)s)")
    parser.add_argument(
        "--real-weights", nargs="+", default=[], metavar="FILE", help="SmolLM2-135M-Instruct as .gguf, or its parts"
    )
    options = parser.parse_args(argv)
    stages = chosen(options.stages)
    if options.device == "cpu" and not options.tiny:
        raise ValueError("--device cpu: full size needs a GPU; add --tiny to try the code")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"this Python has no {', '.join(lacking)}; benchmarks/gpu_wheels.sh collects what it lacks")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(NO_GPU)
    settings = {"device": options.device, "tiny": options.tiny, "real_weights": os.pathsep.join(options.real_weights)}
    record = run_stages(stages, settings, options.out, options.seconds)
    print(f"{options.out}: {record['seconds']:.0f} s")
    return int(any(not found["status"].startswith(("ok", "not run")) for found in record["stages"].values()))


if __name__ == "__main__":
    cli.run(main)
