"""Benchmarks by name, for one model after the other, and their table beside the published one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_tide.evaluate.asking import Asking, Score
from megatron_tide.evaluate.humaneval import humaneval, read_problems
from megatron_tide.evaluate.lm_harness import PROGRAMS, check_lm_task, lm_task
from megatron_tide.evaluate.presets import Preset, preset_of, published, published_row
from megatron_tide.sandbox import require_sandbox

# Benchmarks that are asked and scored here; every other one is a task of lm-eval.
OWN: dict[str, Callable[[Asking, Preset], list[Score]]] = {"humaneval": humaneval}


@dataclass(frozen=True)
class Result:
    """One model's scores on one benchmark."""

    model: str
    path: str
    benchmark: str
    preset: Preset
    scores: list[Score]
    settings: dict[str, Any]
    seconds: float

    def is_headline(self, score: Score) -> bool:
        """Whether a published number stands beside this one."""
        return (score.metric, score.filter) == self.preset.headline


def chosen(benchmark: str, name: str, changes: dict[str, Any]) -> Preset:
    """A benchmark's preset, called ``name``, with the user's ``changes`` (those that are None left out).

    Raises:
        ValueError: a change that makes no sense.
    """
    found = preset_of(benchmark, name)
    asked = {key: value for key, value in changes.items() if value is not None}
    if "new_tokens" in asked:
        asked.setdefault("steps", asked["new_tokens"])  # a token a pass, as in the paper
    preset = replace(found, **asked)
    if preset.new_tokens < 1 or preset.steps < 1:
        raise ValueError(f"{benchmark}: {preset.new_tokens} new tokens in {preset.steps} steps; give 1 or more of each")
    if not 0.0 <= preset.temperature < float("inf"):
        raise ValueError(f"{benchmark}: temperature {preset.temperature}; give 0 (greedy) or more")
    return preset


def check_benchmarks(
    presets: Mapping[str, Preset], *, samples_per_problem: int, unsafe_programs: bool, include: Sequence[str]
) -> None:
    """Whether all of it can be done, before a model is opened: packages, names, the sandbox.

    Raises:
        ValueError: naming what is in the way.
    """
    for name, preset in presets.items():
        if name in OWN:
            read_problems()
            if samples_per_problem > 1 and preset.temperature == 0.0:
                raise ValueError(
                    f"{name}: several samples are all the same at temperature 0; add --temperature 0.8, say"
                )
        else:
            check_lm_task(preset, include)
            if samples_per_problem > 1:
                raise ValueError(f"{name}: several samples a problem are for {', '.join(OWN)} only")
    if any(name in OWN or preset.task in PROGRAMS for name, preset in presets.items()):
        require_sandbox(unsafe_programs)


def run_benchmark(
    benchmark: str, preset: Preset, asking: Asking, name: str, path: str, include: Sequence[str] = ()
) -> Result:
    """Ask one model one benchmark; what it answered before under the same settings is not asked again."""
    started = time.perf_counter()
    own = OWN.get(benchmark)
    scores = own(asking, preset) if own else lm_task(asking, preset, include)
    return Result(name, path, benchmark, preset, scores, asking.settings(preset), time.perf_counter() - started)


def table(results: list[Result]) -> str:
    """For people: a line a number, in percent, with the published columns behind it where they belong."""
    columns = published()["shown"]
    cells = [["model", "benchmark", "metric", "ours (95 %)", "n", *columns]]
    for result in results:
        for score in result.scores:
            metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
            row = published_row(result.benchmark) if result.is_headline(score) else {}
            beside = [f"{row[column]:.2f}" if row else "" for column in columns]
            cells.append([result.model, result.benchmark, metric, _percent(score), str(score.n), *beside])
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    notes = dict.fromkeys(note for result in results for note in _notes(result))
    return "\n".join([texts[0], rule, *texts[1:], *notes, f"published columns: {published()['source']}"])


def _notes(result: Result) -> Iterator[str]:
    """What keeps a number from being compared with the published one as it stands."""
    if result.preset.note:
        yield f"{result.benchmark}: {result.preset.note}"
    paper, mine = asdict(preset_of(result.benchmark)), asdict(result.preset)
    changed = [f"{name} {value}" for name, value in mine.items() if value != paper[name]]
    block = result.settings.get("block_size", result.preset.block_size)
    if block != result.preset.block_size:
        changed.append(f"blocks of {block} ({result.model})")
    if changed:
        yield f"{result.benchmark}: not the paper's settings: {', '.join(changed)}"


def _percent(score: Score) -> str:
    value, low, high = (100 * number for number in score.estimate.to_dict().values())
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def record(results: list[Result]) -> list[dict[str, Any]]:
    """For programs: every number with the settings behind it and the published ones."""
    return [
        {
            "model": result.model,
            "path": result.path,
            "benchmark": result.benchmark,
            "task": result.preset.task,
            "preset": asdict(result.preset),
            "settings": result.settings,
            "scores": [
                {**score.to_dict(), "published": published_row(result.benchmark) if result.is_headline(score) else None}
                for score in result.scores
            ],
            "seconds": result.seconds,
        }
        for result in results
    ]
