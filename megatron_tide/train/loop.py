"""The training loop: windows -> steps -> logs, measurements, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_tide.config import DistillConfig
from megatron_tide.train import checkpoint
from megatron_tide.train.checkpoint import TrainState
from megatron_tide.train.engine import set_learning_rate
from megatron_tide.train.metrics import Journal, Sums, peak_memory
from megatron_tide.train.schedule import learning_rate
from megatron_tide.train.step import Parts, global_counts, to_device, train_step
from megatron_tide.train.windows import Windows

Measure = Callable[[], dict[str, float]]


@dataclass
class StopRequest:
    """Set by Ctrl-C, SIGTERM or SIGUSR1: the step under way is finished, one checkpoint saved, and the run ends."""

    signal: int = 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # asked twice by hand: do not wait
            raise KeyboardInterrupt
        self.signal = number


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last state, the last logged values, and whether somebody asked it to stop."""

    state: TrainState
    values: dict[str, float]
    stopped: bool


class Loop:
    """Runs ``config`` from ``state`` to its last step. Everything is built; nothing here knows how."""

    def __init__(
        self, config: DistillConfig, parts: Parts, windows: Windows, run: dict[str, Any], measure: Measure
    ) -> None:
        self.config, self.parts, self.windows, self.run, self.measure = config, parts, windows, run, measure
        self.folder = Path(config.paths.out)
        self.values: dict[str, float] = {}  # logged last

    def train(self, state: TrainState, stop: StopRequest) -> Outcome:
        parts, config, total = self.parts, self.config, state.total_steps
        journal = Journal(self.folder, parts.world, total, state.step)
        sums, since, stopped = Sums(), time.perf_counter(), False
        for window in self.windows.from_step(state.step, total):
            counts, stopped = global_counts(window, parts.world, bool(stop.signal))
            if stopped:
                break
            lr = self._learning_rate(state)
            set_learning_rate(parts.engine, lr)
            step_sums = train_step(parts, to_device(window, parts.world.device), counts, state.step / total)
            sums.add_step(step_sums, sum(noised.tokens for noised in window))
            state = TrainState(
                step=state.step + 1, total_steps=total, samples_seen=state.samples_seen + config.train.global_batch
            )
            if state.step % config.save.log_every == 0 or state.step == total:
                since = self._log(journal, state, sums, since, lr)
                sums = Sums()
            if config.save.eval_every and state.step % config.save.eval_every == 0:
                journal.write(state.step, self.measure())
            if state.step % config.save.save_every == 0 or state.step == total:
                self._save(state)
        if stopped:
            self._save(state)
        journal.close()
        return Outcome(state=state, values=self.values, stopped=stopped)

    def _learning_rate(self, state: TrainState) -> float:
        train = self.config.train
        return learning_rate(state.step, state.total_steps, train.lr, train.warmup_ratio, train.min_lr_ratio)

    def _save(self, state: TrainState) -> None:
        checkpoint.save(self.folder, self.parts.engine, state, self.run, self.parts.world, self.config.save.keep)

    def _log(self, journal: Journal, state: TrainState, sums: Sums, since: float, lr: float) -> float:
        """Reduce, write and print what was gathered since the last time; the new start of the clock."""
        values = sums.reduce(self.parts.world)
        now = time.perf_counter()
        seconds = self.parts.clock.read()
        spent = sum(seconds.values()) or math.inf
        values |= {f"time/{part}_share": taken / spent for part, taken in seconds.items()}
        values["time/step_s"] = (now - since) / sums.steps
        values["speed/tokens_per_s"] = values.pop("tokens") / (now - since)
        norm = self.parts.engine.get_global_grad_norm()
        values |= {"train/lr": lr, "train/grad_norm": float(norm or 0.0), **peak_memory(self.parts.world.device)}
        journal.write(state.step, values)
        journal.say(state.step, values)
        self.values = values
        return now
