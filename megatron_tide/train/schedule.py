"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, min_ratio: float) -> float:
    """Linear warm-up over the first ``warmup_ratio`` of the steps, then a cosine down to ``min_ratio * peak``.

    ``step`` counts from 0; step 0 of w warm-up steps has peak / w, so it already moves the weights.
    """
    warmup = int(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done)))
