"""The run as one tree of frozen, keyword-only dataclasses. (Being written; StrategyConfig is final.)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Which objective listens to the teacher, how strongly, and what the teacher sees. None = what the strategy says."""

    strategy: str = "tide-cross"
    chunk_objective: str | None = None
    distribution_objective: str | None = None
    temperature: float = 2.0
    distill_weight: float = 1.0
    tidal: str | None = None
    tidal_axes: str = "both"
    tidal_ramp: str = "cosine"
    tidal_init: float = 0.1
    tidal_peak: float = 0.9
    tidal_midrange: bool = False
    compdemo: bool | None = None
    compdemo_ratio: float = 0.5
    compdemo_split: str = "bernoulli"
    compdemo_unit: str = "chunk"
    masking: str = "expand"
    teacher_context: str = "full"
