"""Quality against speed of block decoding: scores and tokens per forward pass over thresholds. Imports no torch.

One number for a curve is its accuracy under parallelism (AUP, d3LLM, arXiv 2601.07568), the area under the score as a
function of tokens per pass where scores below the best are weighted down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.evaluate.bootstrap import Estimate

ALPHA, MOST_LOST = 3.0, 5.0  # published; percent


def at_thresholds(preset: BenchmarkPreset, thresholds: Sequence[float], decoder: str) -> list[BenchmarkPreset]:
    """``preset`` at each threshold; at 1 no probability is higher, which is the preset itself. An autoregressive model
    has no threshold."""
    if decoder == "autoregressive" or not thresholds:
        return [preset]
    return [replace(preset, threshold=None if one >= 1.0 else one) for one in dict.fromkeys(thresholds)]


def threshold_of(benchmark: Mapping[str, Any]) -> str:
    """What is written behind the name of a benchmark of a record (``--json``); empty without a threshold."""
    threshold = benchmark.get("preset", {}).get("threshold")
    return "" if threshold is None else f" at threshold {float(threshold):g}"


@dataclass(frozen=True)
class Point:
    """A benchmark's headline score, or its first one, of a model at a threshold (1: without one)."""

    model: str
    benchmark: str
    metric: str
    threshold: float
    tokens_per_pass: Estimate
    score: Estimate
    """In percent."""


def points(benchmarks: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Those of the benchmarks of a record (``--json``) that some model has at several thresholds."""
    found = [
        _point(one) for one in benchmarks if one.get("tokens_per_pass") and one["scores"]
    ]  # files of older versions have none
    several = {a.benchmark for a in found for b in found if _curve(a) == _curve(b) and a.threshold != b.threshold}
    return [one for one in found if one.benchmark in several]


def _point(benchmark: Mapping[str, Any]) -> Point:
    headline = benchmark["preset"]["headline"]
    scores = {(score["metric"], score["filter"]): score for score in benchmark["scores"]}
    score = scores.get(tuple(headline or ()), benchmark["scores"][0])
    threshold = benchmark["preset"]["threshold"]
    return Point(
        str(benchmark["model"]),
        str(benchmark["benchmark"]),
        ", ".join(str(word) for word in (score["metric"], score["filter"]) if word != "none"),
        1.0 if threshold is None else float(threshold),
        Estimate(**{end: float(benchmark["tokens_per_pass"][end]) for end in ("value", "low", "high")}),
        Estimate(**{end: 100 * float(score[end]) for end in ("value", "low", "high")}),
    )


def _curve(point: Point) -> tuple[str, str]:
    return point.benchmark, point.model


def curves(found: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by (benchmark, model), by tokens per pass."""
    by_curve: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(found, key=lambda point: (point.tokens_per_pass.value, -point.threshold)):
        by_curve.setdefault(_curve(point), []).append(point)
    return {curve: by_curve[curve] for curve in dict.fromkeys(map(_curve, found))}


def accuracy_under_parallelism(tokens: Sequence[float], scores: Sequence[float], best: float) -> float:
    """AUP of a curve: r_1 y_1 + sum over i of (r_i - r_(i-1)) (y_i w(y_i) + y_(i-1) w(y_(i-1))) / 2, with tokens per
    pass r (ascending), scores y in percent, and w(y) = min(exp(-3 (1 - y / best)), 1). Points with a score more than 5
    below that of the first are left out. ``best``: the best score of any model.
    """
    kept = [(r, y) for r, y in zip(tokens, scores, strict=True) if y >= scores[0] - MOST_LOST]
    weighted = [y * min(math.exp(-ALPHA * (1.0 - y / best)), 1.0) if best > 0.0 else 0.0 for _, y in kept]
    steps = zip(kept, kept[1:], weighted, weighted[1:])
    return kept[0][0] * kept[0][1] + sum((r - before) * (w + old) / 2 for (before, _), (r, _), old, w in steps)


def parallelism_table(found: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people; the AUP of a curve of several points stands in its first row."""
    head = ["model", "benchmark", "metric", "threshold", "tokens per pass (95 %)", "score (95 %)", "AUP"]
    rows = []
    for (benchmark, _), curve in curves(found).items():
        best = max(point.score.value for point in found if point.benchmark == benchmark)
        tokens, scores = ([getattr(one, name).value for one in curve] for name in ("tokens_per_pass", "score"))
        area = f"{accuracy_under_parallelism(tokens, scores, best):.1f}" if len(curve) > 1 else ""
        for point in curve:
            name = [point.model, point.benchmark, point.metric, f"{point.threshold:g}"]
            rows.append([*name, _interval(point.tokens_per_pass), _interval(point.score), area])
            area = ""
    return head, rows


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
