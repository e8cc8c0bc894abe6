"""The table of benchmarks for people, with the published numbers and what keeps them from being compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_tide.evaluate.benchmark_presets import preset_of, published
from megatron_tide.evaluate.parallelism import parallelism_table, points, threshold_of
from megatron_tide.evaluate.score_table import text_table

if TYPE_CHECKING:
    from megatron_tide.evaluate.harness import BenchmarkResult, MetricScore


def benchmark_table(results: Sequence[BenchmarkResult]) -> str:
    """For people: one line per number, in percent, with the published columns behind it where they belong."""
    columns = published()["shown"]
    head, cells = ["model", "benchmark", "metric", "ours (95 %)", "n", *columns], []
    found = points([result.to_dict() for result in results])
    for result in results:
        for score in result.scores:
            metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
            row = result.published(score)
            beside = [f"{row[column]:.2f}" if row else "" for column in columns]
            name = result.benchmark + threshold_of(result.to_dict())
            cells.append([result.model, name, metric, _percent(score), str(score.n), *beside])
    curves = ["", text_table(*parallelism_table(found)), ""] if found else []
    notes = dict.fromkeys(note for result in results for note in _notes(result))
    return "\n".join([text_table(head, cells), *curves, *notes, f"published columns: {published()['source']}"])


def _notes(result: BenchmarkResult) -> Iterator[str]:
    """Why a number cannot be compared with the published one as it stands."""
    if result.preset.note:
        yield f"{result.benchmark}: {result.preset.note}"
    for note in result.notes:
        yield f"{result.benchmark} ({result.model}): {note}"
    paper, mine = asdict(preset_of(result.benchmark)), asdict(result.preset)
    changed = [f"{name} {value}" for name, value in mine.items() if paper[name] not in (None, value)]
    block = result.settings.get("block_size", result.preset.block_size)
    if result.preset.threshold is not None:
        changed.append(f"threshold {result.preset.threshold:g}")
    if block != result.preset.block_size:
        changed.append(f"blocks of {block} ({result.model})")
    layout = result.settings.get("block_layout", result.preset.block_layout)
    if layout != result.preset.block_layout:
        changed.append(f"block_layout {layout} ({result.model})")
    if changed:
        yield f"{result.benchmark}: not the paper's settings: {', '.join(changed)}"


def _percent(score: MetricScore) -> str:
    value, low, high = (100 * number for number in score.estimate.to_dict().values())
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
