"""The phases of one run: which strategy and which block size each step trains with.

Both are pure functions of (step, total steps), so a run resumes exactly, also between two phases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_tide.choices import STRATEGIES, named
from megatron_tide.config import StrategyConfig
from megatron_tide.objectives import Strategy, build_strategy

Value = TypeVar("Value")
EXAMPLES = {"--pretraining": "ar:0.4,joint:0.4", "--block-growth": "8:0.5,16:0.25"}


@dataclass(frozen=True)
class Phase:
    """Steps ``start`` .. ``end`` - 1, trained with one strategy."""

    strategy: Strategy
    start: int
    end: int

    def progress(self, step: int) -> float:
        """The share of the phase that lies before ``step``: what TIDAL's strength grows with."""
        return (step - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class Phases:
    """The phases of a run in order, and (block size, end) in order; the last of each ends with the run."""

    phases: tuple[Phase, ...]
    blocks: tuple[tuple[int, int], ...]

    @property
    def last(self) -> Phase:
        return self.phases[-1]

    def at(self, step: int) -> Phase:
        """The phase of a step, counted from 0."""
        return next((phase for phase in self.phases if step < phase.end), self.last)

    def block(self, step: int) -> int:
        """The student's block size at a step."""
        return next((block for block, end in self.blocks if step < end), self.blocks[-1][0])

    def describe(self) -> list[dict[str, Any]]:
        """For run.json: name and end of each phase."""
        return [{"strategy": phase.strategy.name, "end": phase.end} for phase in self.phases]

    def metrics(self, step: int) -> dict[str, float]:
        """For the logs: the number of the phase and the block size, each where a run has several."""
        values = {"train/phase": self.phases.index(self.at(step)), "train/block_size": self.block(step)}
        several = {"train/phase": len(self.phases) > 1, "train/block_size": len(self.blocks) > 1}
        return {name: float(value) for name, value in values.items() if several[name]}


def build_phases(config: StrategyConfig, strategy: Strategy, total: int, block: int) -> Phases:
    """The phases of ``--pretraining``, then ``strategy``; block sizes of ``--block-growth``, then the data's ``block``.

    Raises:
        ValueError: one line with the flag: not NAME:SHARE, a strategy that needs a teacher, a size that does not fit.
    """

    def pretraining(name: str) -> Strategy:
        if named(STRATEGIES, name, "strategy").distils:
            raise ValueError(f"{name} needs a teacher; only --strategy, which comes last, can have one")
        plain = replace(config, chunk_objective=None, distribution_objective=None, tidal=None, compdemo=None)
        rows = StrategyConfig().distribution_rows
        return build_strategy(replace(plain, strategy=name, tidal_midrange=False, distribution_rows=rows), None)

    def size(text: str) -> int:
        if not text.isdecimal() or not int(text) or block % int(text):
            raise ValueError(f"{text} is not a divisor of {block}, the block size that the data are prepared for")
        return int(text)

    strategies = [*read_shares(config.pretraining, "--pretraining", pretraining, total), (strategy, total)]
    starts = [0, *(end for _, end in strategies)]
    phases = tuple(Phase(one, start, end) for (one, end), start in zip(strategies, starts))
    if config.score_prompt and not any(phase.strategy.student.next_token for phase in phases):
        raise ValueError("--score-prompt has no effect: no phase has a next-token loss (--pretraining ar or joint)")
    return Phases(phases, (*read_shares(config.block_growth, "--block-growth", size, total), (block, total)))


def read_shares(text: str, flag: str, read: Callable[[str], Value], total: int) -> list[tuple[Value, int]]:
    """Of a text "a:0.4,b:0.2" [(read("a"), its end), ...]: ends are numbers of steps of ``total``, rounded.

    Raises:
        ValueError: one line with the flag: not NAME:SHARE, ``read`` refuses, a share outside (0, 1], a sum above 1.
    """
    found, sum_of_shares = [], 0.0
    for part in text.split(",") if text else []:
        name, _, share = part.strip().partition(":")
        try:
            value, number = read(name), float(share)
        except ValueError as error:
            raise ValueError(f"{flag} {text}: {error}; use NAME:SHARE,... such as {EXAMPLES[flag]}") from None
        sum_of_shares += number
        if not 0 < number <= 1 or sum_of_shares > 1 + 1e-9:
            raise ValueError(f"{flag} {text}: shares of the run must be above 0, and at most 1 in sum")
        found.append((value, round(sum_of_shares * total)))
    return found
