"""One self-contained HTML file: styles inside, pictures as data URIs, no script, nothing fetched.

page.html holds its text and escapes what it is given; here are the numbers and groups that it shows.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_tide import __version__
from megatron_tide.evaluate.parallelism import parallelism_table
from megatron_tide.evaluate.score_table import score_table
from megatron_tide.files import atomic_write
from megatron_tide.hub import public_name
from megatron_tide.report import figures
from megatron_tide.report.alignment import aligned_samples
from megatron_tide.report.inference import Table
from megatron_tide.report.run_folder import Run, Scores, TrainingRun, at_end, reason
from megatron_tide.report.style import NARROW, looks, png
from megatron_tide.screen import printable

INDEX = "index.html"
MARK = Markup('<meta name="generator" content="megatron_tide report">')
HEAD_BYTES = 1000  # MARK is among the first of them
NOTHING = "–"
TIMES = {  # column -> name in the logs, format, unit
    "s per step": ("time/step_s", ".3g", 1),
    "tokens/s": ("speed/tokens_per_s", ",.0f", 1),
    "teacher": ("time/teacher_share", ".0%", 1),
    "student": ("time/student_share", ".0%", 1),
    "process, GiB": ("memory/host_peak_bytes", ".2f", 2**30),
    "GPU, GiB": ("memory/device_peak_bytes", ".2f", 2**30),
    "pipeline bubble": ("teacher/pipeline_bubble", ".0%", 1),
}


def build_page(runs: Sequence[Run]) -> str:
    """The page of one run, or of several beside each other."""
    trainings = [training for run in runs for training in run.trainings]
    timed = [training for training in trainings if "time/student_share" in training.metrics]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"attempt": attempt, "draw": draw, "end": end, "figures": figures}
    environment.globals |= {"aligned_samples": aligned_samples, "public_name": public_name}
    page = environment.get_template("page.html").render(
        mark=MARK,
        title=f"Distillation report: {' against '.join(run.label for run in runs)}",
        version=f"megatron_tide {__version__}, {time.strftime('%Y-%m-%d %H:%M')}",
        runs=runs,
        trainings=trainings,
        looks=looks([training.label for training in trainings]),
        groups=_groups(trainings),
        timestep_groups=_groups([one for one in trainings if not one.by_bin("denoise_by_timestep").empty]) or [[]],
        trained=_trained(trainings),
        tidal=_tidal_groups(trainings),
        timed=timed,
        times=Table(["run", *TIMES], [[one.label, *(end(one, *how) for how in TIMES.values())] for one in timed]),
        **_scores([run.scores for run in runs if run.scores]),
    )
    return page.strip() + "\n"


def end(training: TrainingRun, name: str, spec: str, unit: float = 1.0) -> str:
    """A logged number at the end of a run, as text."""
    return _number(at_end(training.curve(name)) / unit, spec)


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What ``function`` returns, or why it cannot: whatever corrupt numbers or folders cause does not stop the rest."""
    try:
        return function(*arguments), ""
    except Exception as error:
        return None, reason(error)


def draw(function: Callable[..., Figure], arguments: Sequence[Any]) -> dict[str, Any]:
    """The figure as a PNG in base64, and whether it is a narrow one."""
    figure = function(*arguments)
    return {"image": base64.b64encode(png(figure)).decode("ascii"), "narrow": figure.get_figwidth() <= NARROW}


def _number(value: Any, spec: str) -> str:
    """``value`` as text; a word as a word, nothing as a dash."""
    if isinstance(value, (int, float)):
        return NOTHING if math.isnan(value) else format(value, spec)
    return NOTHING if value in (None, "none") else str(value).replace("_", " ")


def _groups(trainings: Sequence[TrainingRun]) -> list[list[TrainingRun]]:
    """Runs that share base model and data, together; groups with a teacher first, then the larger ones."""
    groups: dict[tuple[str, str], list[TrainingRun]] = {}
    for training in trainings:
        groups.setdefault((training.base_model or training.label, training.data), []).append(training)
    return sorted(groups.values(), key=lambda group: (not any(one.has_teacher for one in group), -len(group)))


def _tidal_groups(trainings: Sequence[TrainingRun]) -> dict[str, list[TrainingRun]]:
    """Runs with TIDAL by its flags."""
    groups: dict[str, list[TrainingRun]] = {}
    for training in trainings:
        if "tidal_axes" in training.strategy:
            flags = ", ".join(
                f"{name} {training.strategy.get(f'tidal_{name}')}" for name in ("axes", "ramp", "init", "peak")
            )
            groups.setdefault(flags, []).append(training)
    return groups


def _trained(trainings: Sequence[TrainingRun]) -> Table:
    objectives = {"strategy": "strategy", "chunks": "chunk_objective", "distribution": "distribution_objective"}
    losses = {"total": "loss/total", "denoising": "loss/denoise", "distillation": "loss/distill"}
    rows = []
    for training in trainings:
        built = training.strategy
        tidal = {str(built.get(f"{kind}_tidal", "off")) for kind in ("chunk", "distribution")} - {"off"}
        row = [training.label, *(_number(built.get(name), "g") for name in objectives.values())]
        row += [", ".join(sorted(tidal)) or NOTHING, "yes" if built.get("compdemo") else NOTHING]
        row += [_number(built.get("temperature"), "g"), f"{training.metrics.index[-1]:.0f} of {training.last_step}"]
        shown = [end(training, name, ".4f") for name in losses.values()]
        rows.append([*row, *(shown if training.has_teacher else [*shown[:2], NOTHING])])
    return Table(["run", *objectives, "TIDAL", "CompDemo", "T", "steps", *losses], rows)


def _scores(scores: Sequence[Scores]) -> dict[str, Any]:
    """What the page shows of likelihoods and benchmarks."""
    scored = [one for one in scores if one.cells]
    parallelism = [point for one in scores for point in one.parallelism]
    return {
        "likelihoods": pd.concat([one.models for one in scored]) if scored else None,
        "samples": ", ".join(str(one.settings.get("samples", "?")) for one in scored),
        "comparable": all(one.settings == scored[0].settings for one in scored),
        "by_timestep": [pair for one in scored for pair in zip(one.models["name"], one.by_timestep)],
        "likelihood_table": Table(*score_table([row for one in scored for row in one.cells])),
        "benchmarks": [row for one in scores for row in one.benchmarks],
        "parallelism": parallelism,
        "parallelism_table": Table(*parallelism_table(parallelism)),
    }


def check_out(out: Path) -> None:
    """Refuse a folder where the page would replace something else.

    Raises:
        ValueError: what is in the way.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, not a folder; take another --out")
    page = out / INDEX
    if page.is_file():
        with page.open("rb") as file:
            ours = str(MARK).encode() in file.read(HEAD_BYTES)
    if page.exists() and not (page.is_file() and ours):
        raise ValueError(f"{out}: holds {INDEX}, which no report wrote; take another --out")


def write_page(out: Path, page: str) -> Path:
    """Write index.html of ``out`` and touch nothing else there; -> its path.

    Raises:
        ValueError: ``check_out``'s.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_out(out)
    atomic_write(out / INDEX, page.encode("utf-8"))
    return out / INDEX
