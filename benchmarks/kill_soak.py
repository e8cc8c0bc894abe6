"""A small run that is killed many times and must resume each time as if it had not been interrupted.

One rank trains a tiny student with TIDE-Cross in fp32, a checkpoint every step. It is killed with SIGKILL at random
moments: some anywhere in its life, some after it has taken a step, some while a checkpoint is being written. Started
again with --resume auto, it must begin at the newest complete checkpoint, and its final weights must equal those of an
uninterrupted run, bit for bit. Each start is a separate process, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

from benchmarks.common import report
from megatron_tide import cli, distill
from megatron_tide.files import TEMPORARY
from megatron_tide.optimizer import ADAMW
from megatron_tide.train import checkpoint
from megatron_tide.training_checkpoint import PREFIX, WEIGHTS, newest_complete
from tests.support.chain import Chain, make_chain

LIFE = 4.0  # seconds: about what it takes to start and take some steps
SETTLED = 2.0  # seconds after the first step of a life
KILLED = -signal.SIGKILL
DRAFTS = f"{TEMPORARY}*"


def train(flags: list[str], log: str) -> None:
    """One life: the product's own command."""
    printed = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    cli.run(distill.main, flags)


class Soak:
    """The run that is killed, and what is counted."""

    def __init__(self, chain: Chain, out: Path, steps: int, seed: int) -> None:
        self.out, self.chance = out, random.Random(seed)
        settings: dict[str, Any] = {"max_steps": steps, "save_every": 1, "keep_last": 2, "strategy": "tide-cross"}
        self.flags = chain.flags(out, **settings)
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["tests.support.preload"])
        self.kills = self.kills_in_save = self.lost_steps = self.corrupt_resumes = 0

    def live(self, moment: str | None) -> bool:
        """Start, and kill at a ``moment`` (None: let it be); -> whether the run has finished."""
        whole = self._newest_whole()
        log = self.out.with_suffix(".log")
        log.write_bytes(b"")
        process = self.processes.Process(target=train, args=(self.flags, str(log)))
        process.start()
        if moment is not None:
            MOMENTS[moment](self, process, log)
            process.kill()
        process.join()
        self.kills += process.exitcode == KILLED
        if process.exitcode == KILLED and any(self.out.glob(DRAFTS)):
            self.kills_in_save += 1
        self._check(whole, log.read_text(errors="replace"), process.exitcode)
        return process.exitcode == 0

    def _newest_whole(self) -> Path | None:
        return newest_complete(self.out, lambda line: None)

    def _check(self, whole: Path | None, printed: str, status: int | None) -> None:
        """Compare where this life began with the newest checkpoint that was whole when the last one ended."""
        if status not in (0, KILLED):
            raise RuntimeError(f"a life ended by itself with status {status}:\n{printed[-3000:]}")
        began = re.search(r"resuming from (\S+) at step (\d+)", printed)
        if began and whole is None:
            self.corrupt_resumes += 1
        elif began and Path(began[1]).name != whole.name:  # type: ignore[union-attr]
            behind = int(whole.name.removeprefix(PREFIX)) - int(began[2])  # type: ignore[union-attr]
            self.lost_steps += max(0, behind)
            self.corrupt_resumes += behind < 0
        elif not began and whole is not None and "step " in printed:
            self.lost_steps += int(whole.name.removeprefix(PREFIX))

    def _first_step(self, process: Any, log: Path) -> None:
        while process.is_alive() and b"\nstep" not in b"\n" + log.read_bytes():
            time.sleep(0.01)

    def anywhere(self, process: Any, log: Path) -> None:
        time.sleep(self.chance.uniform(0, LIFE))

    def after_a_step(self, process: Any, log: Path) -> None:
        self._first_step(process, log)
        time.sleep(self.chance.uniform(0, SETTLED))

    def in_a_save(self, process: Any, log: Path) -> None:
        self._first_step(process, log)
        time.sleep(self.chance.uniform(0, 0.3))
        while process.is_alive() and not any(self.out.glob(DRAFTS)):
            time.sleep(0.0005)
        time.sleep(self.chance.uniform(0, 0.01))


MOMENTS = {"anywhere": Soak.anywhere, "after a step": Soak.after_a_step, "in a save": Soak.in_a_save}


def final_tensors(run: Path, steps: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.checkpoint_folder(run, steps)
    names = (WEIGHTS, *(f"{moment}.safetensors" for moment in ADAMW.moments))
    return {f"{file}/{name}": tensor for file in names for name, tensor in load_file(folder / file).items()}


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--kills", type=int, default=100, help="how often (default: %(default)s)")
    parser.add_argument("--in-save", type=int, default=30, help="of them inside a save (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        chain = make_chain(Path(folder) / "chain")
        untouched = Soak(chain, Path(folder) / "untouched", options.steps, 0)
        untouched.live(None)
        soak, finished = Soak(chain, Path(folder) / "killed", options.steps, options.seed), False
        while not finished and (soak.kills < options.kills or soak.kills_in_save < options.in_save):
            turn = "in a save" if soak.kills % 2 else soak.chance.choice(["anywhere", "after a step"])
            finished = soak.live(turn)
            print(f"kill {soak.kills}/{options.kills} ({soak.kills_in_save} in a save)", file=sys.stderr, flush=True)
        finished = finished or soak.live(None)
        ours, theirs = (final_tensors(run.out, options.steps) for run in (soak, untouched))
    identical = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    counted = {name: getattr(soak, name) for name in ("kills", "kills_in_save", "lost_steps", "corrupt_resumes")}
    figures = {**counted, "identical": identical, "steps": options.steps, "seconds": time.perf_counter() - started}
    report("kill_soak", figures, options.json)
    return 0 if identical and finished and not (soak.lost_steps or soak.corrupt_resumes) else 1


if __name__ == "__main__":
    cli.run(main)
