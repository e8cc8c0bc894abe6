"""What ranks do in tests of training: run the product's own entry on a tiny chain, and tell what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tide.config import from_flat


def train_and_tell(flags: dict[str, Any]) -> dict[str, list[float]]:
    """Train ``flags`` on this rank of the world its environment describes; losses and gradient norms by step.

    Meant for ``run_on_ranks``.
    """
    from megatron_tide import distill
    from megatron_tide.train.distributed import destroy_distributed, init_distributed

    config = from_flat(flags)
    config.check()
    world = init_distributed()
    try:
        assert distill.train(config, world) == 0
    finally:
        destroy_distributed()
    return read_curve(Path(config.paths.out))


def read_curve(run: Path) -> dict[str, list[float]]:
    """Every logged value of a run, by name, in order of steps."""
    curve: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            curve.setdefault(name, []).append(value)
    return curve
