"""The training loop: micro-batches -> steps -> logs, evaluations, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_tide.choices import METRIC_LOGS
from megatron_tide.config import DistillConfig
from megatron_tide.train import checkpoint
from megatron_tide.train.engine import set_learning_rates, skipped
from megatron_tide.train.metrics import MetricAccumulator, MetricLogger, peak_memory
from megatron_tide.train.microbatches import MicrobatchLoader
from megatron_tide.train.nonfinite import NonFiniteGuard
from megatron_tide.train.schedule import learning_rate
from megatron_tide.train.step import TrainContext, global_counts, train_step
from megatron_tide.training_checkpoint import TrainState

Measure = Callable[[], dict[str, float]]


@dataclass
class StopRequest:
    """Set by Ctrl-C, SIGTERM or SIGUSR1: the run finishes its current step, saves a checkpoint and ends."""

    signal: int = 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # Ctrl-C twice: do not wait
            raise KeyboardInterrupt
        self.signal = number


class Loop:
    """Trains from a state to the last step, with the objects from ``build``."""

    def __init__(
        self, config: DistillConfig, context: TrainContext, loader: MicrobatchLoader, run: dict[str, Any]
    ) -> None:
        self.config, self.context, self.loader, self.run = config, context, loader, run
        self.folder = Path(config.paths.out)

    def train(self, state: TrainState, stop: StopRequest, measure: Measure) -> TrainState:
        """Train up to the last step of ``run``, or until a rank receives a stop signal; saves either way.

        ``measure()`` evaluates on held-out data (a collective), every ``eval_every`` steps.
        """
        context, save, last = self.context, self.config.save, self.run["until_step"]
        board, about = METRIC_LOGS[save.log_to], self.run["config"]
        logger = MetricLogger(self.folder, context.world, last, state.step, board, about)
        nonfinite = NonFiniteGuard(self.folder, self.loader, context.world)
        accumulator, since, saved = MetricAccumulator(), time.perf_counter(), state.step
        for microbatches in self.loader.from_step(state.step, last, context.world.device):
            context.world.trace.heartbeat(state.step + 1)
            counts, stopped = global_counts(microbatches, context.world, bool(stop.signal))
            if stopped:
                break
            set_learning_rates(context.engine, partial(self._learning_rate, state))
            phase = self.loader.phases.at(state.step)
            progress = phase.progress(state.step)
            step_sums = train_step(context.with_strategy(phase.strategy), microbatches, counts, progress)
            if skipped(context.engine):
                nonfinite.skipped(state, step_sums)
            else:
                nonfinite.stepped()
                accumulator.add_step(step_sums, sum(batch.tokens for batch in microbatches))
            state = state.after_step(self.config.train.global_batch_size)
            if nonfinite.before and nonfinite.exhausted:
                self._save(nonfinite.before)
                raise nonfinite.refusal()
            if accumulator.steps and (state.step % save.log_every == 0 or state.step == last):
                since = self._log(logger, state, accumulator, since)
                accumulator = MetricAccumulator()
            if save.eval_every and state.step % save.eval_every == 0:
                logger.write(state.step, measure())
            if state.step % save.save_every == 0 and not nonfinite.before:
                saved = self._save(state)
        if saved != state.step:
            self._save(state)
        logger.close()
        return state

    def _learning_rate(self, state: TrainState, peak: float) -> float:
        return learning_rate(state.step, state.total_steps, peak, self.config.train)

    def _save(self, state: TrainState) -> int:
        checkpoint.save(
            self.folder, self.context.engine, state, self.run, self.context.world, self.config.save.keep_last
        )
        return state.step

    def _log(self, logger: MetricLogger, state: TrainState, accumulator: MetricAccumulator, since: float) -> float:
        """Reduce, write and print the metrics since the last log line; returns the time of this one."""
        values = accumulator.reduce(self.context.world)
        now = time.perf_counter()
        seconds = self.context.clock.read()
        spent = sum(seconds.values()) or math.inf
        values |= {f"time/{part}_share": taken / spent for part, taken in seconds.items()}
        values["time/step_s"] = (now - since) / accumulator.steps
        values["speed/tokens_per_s"] = values.pop("tokens") / (now - since)
        values |= self.context.world.mean_over_ranks(self.context.backend.metrics())
        values |= (phases := self.loader.phases).metrics(state.step - 1)
        norm = self.context.engine.get_global_grad_norm()
        lr = self.context.engine.optimizer.param_groups[-1]["lr"]  # AdamW's: each optimizer's last group
        values |= {"train/lr": lr, "train/grad_norm": float(norm or 0.0), **peak_memory(self.context.world.device)}
        logger.write(state.step, values)
        phase = phases.at(state.step - 1).strategy.name if len(phases.phases) > 1 else ""
        logger.print_rank0(state.step, values, phase)
        return now
