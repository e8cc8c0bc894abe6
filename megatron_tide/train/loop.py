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
from megatron_tide.train.engine import left_out, set_learning_rate
from megatron_tide.train.guard import Guard
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


class Loop:
    """Runs from a state to the last step. Everything it uses is built; nothing here knows how."""

    def __init__(self, config: DistillConfig, parts: Parts, windows: Windows, run: dict[str, Any]) -> None:
        self.config, self.parts, self.windows, self.run = config, parts, windows, run
        self.folder = Path(config.paths.out)

    def train(self, state: TrainState, stop: StopRequest, measure: Measure) -> TrainState:
        """Train until ``state.step == state.total_steps``, or until a rank is asked to stop; saved either way.

        ``measure()`` gives held-out values (a collective); it is called every ``eval_every`` steps.
        """
        parts, save, total = self.parts, self.config.save, state.total_steps
        journal = Journal(self.folder, parts.world, total, state.step)
        guard = Guard(self.folder, self.windows, parts.world)
        sums, since, saved = Sums(), time.perf_counter(), state.step
        for window in self.windows.from_step(state.step, total):
            parts.world.trace.moved(state.step + 1)
            counts, stopped = global_counts(window, parts.world, bool(stop.signal))
            if stopped:
                break
            lr = self._learning_rate(state)
            set_learning_rate(parts.engine, lr)
            step_sums = train_step(parts, to_device(window, parts.world.device), counts, state.step / total)
            if left_out(parts.engine):
                guard.left_out(state, step_sums)
            else:
                guard.taken()
                sums.add_step(step_sums, sum(noised.tokens for noised in window))
            state = state.after_step(self.config.train.global_batch)
            if guard.before and guard.exhausted:
                self._save(guard.before)
                raise guard.refusal()
            if sums.steps and (state.step % save.log_every == 0 or state.step == total):
                since = self._log(journal, state, sums, since, lr)
                sums = Sums()
            if save.eval_every and state.step % save.eval_every == 0:
                journal.write(state.step, measure())
            if state.step % save.save_every == 0 and not guard.before:
                saved = self._save(state)
        if saved != state.step:
            self._save(state)
        journal.close()
        return state

    def _learning_rate(self, state: TrainState) -> float:
        train = self.config.train
        return learning_rate(state.step, state.total_steps, train.lr, train.warmup_ratio, train.min_lr_ratio)

    def _save(self, state: TrainState) -> int:
        checkpoint.save(self.folder, self.parts.engine, state, self.run, self.parts.world, self.config.save.keep)
        return state.step

    def _log(self, journal: Journal, state: TrainState, sums: Sums, since: float, lr: float) -> float:
        """Reduce, write and print what was gathered since the last time; the new start of the clock."""
        values = sums.reduce(self.parts.world)
        now = time.perf_counter()
        seconds = self.parts.clock.read()
        spent = sum(seconds.values()) or math.inf
        values |= {f"time/{part}_share": taken / spent for part, taken in seconds.items()}
        values["time/step_s"] = (now - since) / sums.steps
        values["speed/tokens_per_s"] = values.pop("tokens") / (now - since)
        values |= self.parts.world.mean_over_ranks(self.parts.host.read())
        norm = self.parts.engine.get_global_grad_norm()
        values |= {"train/lr": lr, "train/grad_norm": float(norm or 0.0), **peak_memory(self.parts.world.device)}
        journal.write(state.step, values)
        journal.say(state.step, values)
        return now
