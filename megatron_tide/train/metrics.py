"""A run's metrics: sums that stay on the device until a log line is due, and the logs they go to."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tide.files import atomic_write, open_to_append, read_whole
from megatron_tide.objectives.common import bin_names, means_by_bin
from megatron_tide.ranks import on_main
from megatron_tide.screen import clock_text, plain
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.metric_logs import TensorBoard
from megatron_tide.training_checkpoint import METRICS

Metric = tuple[torch.Tensor, torch.Tensor]  # sum, count: scalars, or one of each bin


class MetricAccumulator:
    """Named (sum, count) pairs; and losses, local sums over global counts, averaged over the steps that have them."""

    def __init__(self) -> None:
        self.means: dict[str, Metric] = {}
        self.losses: dict[str, torch.Tensor] = {}
        self.loss_steps: Counter[str] = Counter()
        self.tokens = 0  # student training tokens of this rank
        self.steps = 0
        self.forwards: list[torch.Tensor] = []  # the loss of each micro-batch, in order

    def add(self, metrics: Mapping[str, Metric]) -> None:
        for name, (total, count) in metrics.items():
            old = self.means.get(name)
            self.means[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def add_losses(self, losses: Mapping[str, torch.Tensor]) -> None:
        for name, loss in losses.items():
            old = self.losses.get(name)
            self.losses[name] = loss.detach().double() if old is None else old + loss.detach()

    def add_step(self, step: MetricAccumulator, tokens: int) -> None:
        """Add one step; ``tokens``: number of student tokens of this rank in it."""
        self.add(step.means)
        self.add_losses(step.losses)
        self.loss_steps.update(step.losses.keys())
        self.tokens += tokens
        self.steps += 1

    def reduce(self, world: DistContext) -> dict[str, float]:
        """Global values: one collective, one synchronisation. Means with count 0 are omitted."""
        metrics, losses = sorted(self.means), sorted(self.losses)
        names = [one for name in metrics for one in (bin_names(name) if self.means[name][0].ndim else [name])]
        parts = [torch.tensor(float(self.tokens)), *(self.losses[name] / self.loss_steps[name] for name in losses)]
        parts += [values for half in (0, 1) for values in (self.means[name][half] for name in metrics)]
        flat = torch.cat([part.detach().to(world.device, torch.float64).reshape(-1) for part in parts])
        tokens, *values = world.sum_tensor_(flat).tolist()
        of_losses, means = values[: len(losses)], values[len(losses) :]
        result = {"tokens": tokens, **dict(zip(losses, of_losses))}
        for name, total, count in zip(names, means[: len(names)], means[len(names) :], strict=True):
            if count:
                result[name] = total / count
        return result


def denoise_metrics(target_logprobs_M: torch.Tensor, rate_M: torch.Tensor) -> dict[str, Metric]:
    """Mean -log p of masked tokens, over all and by bin of their masking rate (nats per token)."""
    nats_M = -target_logprobs_M.double()
    total = nats_M.sum()
    mean = {"denoise/nats_per_masked_token": (total, torch.full_like(total, nats_M.numel()))}
    return mean | means_by_bin("denoise_by_timestep", rate_M, nats_M)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in bytes: of this process on the CPU, and on its GPU if it has one."""
    peaks = {"memory/host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    if device.type == "cuda":
        peaks["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return peaks


class MetricLogger:
    """Rank 0's logs: metrics.jsonl, TensorBoard or another ``board``, and one line on the terminal. Other ranks write
    nothing. ``about``: the flags of the run.

    A resumed run removes the lines of the steps it will repeat, so that each step appears once.
    """

    def __init__(
        self,
        folder: Path,
        world: DistContext,
        total_steps: int,
        first_step: int,
        board: type[TensorBoard] = TensorBoard,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._main = world.is_main
        self._total, self._first, self._started = total_steps, first_step, time.monotonic()
        on_main(world, lambda: self._open(folder, first_step, board, about or {}))

    def _open(self, folder: Path, first_step: int, board: type[TensorBoard], about: Mapping[str, Any]) -> None:
        path = folder / METRICS
        kept = []
        if path.exists():
            lines = read_whole(path).decode("utf-8", "replace").split("\n")
            kept = [line for line in lines if _step_of(line) <= first_step]
        atomic_write(path, "".join(line + "\n" for line in kept).encode())
        self._file = open_to_append(path)
        self._board = board(folder, first_step, about)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._main:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._board.write(step, values)

    def print_rank0(self, step: int, values: dict[str, float], phase: str = "") -> None:
        """Print the progress line: step, its phase, losses, speed, time left."""
        if not self._main:
            return
        done = max(1, step - self._first)
        left = (time.monotonic() - self._started) / done * (self._total - step)
        parts = {"denoise": "denoise", "next_token": "next token", "distill": "distill"}
        losses = [f"  {said} {values[f'loss/{name}']:.4f}" for name, said in parts.items() if f"loss/{name}" in values]
        text = (
            f"step {step:>{len(str(self._total))}}/{self._total}{phase and '  ' + phase}"
            f"  loss {values['loss/total']:.4f}{''.join(losses)}  lr {values['train/lr']:.2e}"
            f"  {values['speed/tokens_per_s']:,.0f} tok/s  teacher {values['time/teacher_share']:.0%}"
            f"  left {clock_text(left)}"
        )
        start, end = ("\r\033[K", "") if sys.stdout.isatty() else ("", "\n")
        print(start + text, end=end, flush=True, file=plain(sys.stdout))

    def close(self) -> None:
        if self._main:
            if sys.stdout.isatty():
                print()
            self._file.close()
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError):
        return float("inf")
