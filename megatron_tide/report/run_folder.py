"""Read a run folder. Missing or corrupt files are listed in ``notes``; they do not stop the rest.

A recipe's folder (``runs/NAME``) holds one subfolder per training run (metrics.jsonl, run.json) and, beside them,
scores.json, completions.jsonl, the inference benchmark, a bridge, and the stamps of its stages. The folder of one
training run can be read alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from megatron_tide.cli import PROGRAM
from megatron_tide.evaluate.parallelism import Point, points, threshold_of
from megatron_tide.evaluate.score_table import score_cells
from megatron_tide.files import STAGES, read_json
from megatron_tide.report.inference import inference
from megatron_tide.screen import printable
from megatron_tide.tables import read_rows

METRICS, STAMPS, ANSWERS = "metrics.jsonl", ".stages", "completions.jsonl"
DISTILL, EVALUATE, GENERATE = (f"{PROGRAM} {command}" for command in ("distill", "evaluate", "generate --json"))
INFERENCE, INFERENCE_COMMAND = "inference_benchmark.json", f"{PROGRAM} inference-benchmark"
CORPUS, CORPUS_COMMAND = "corpus/manifest.json", f"{PROGRAM} corpus"
ENDS = 0.2  # the start and the end of a run: this share of its log lines
BITS = "bits_per_masked_token"
LARGEST = 1e300  # beyond it nothing can be drawn
MOST_VALUES = 1 << 27  # of a run: its log lines times the names in them


def reason(error: Exception) -> str:
    """What went wrong, in one short line."""
    known = {KeyError: f"no {error}", ValueError: str(error)}
    return textwrap.shorten(printable(known.get(type(error), f"{type(error).__name__}: {error}")), 300)


def at_start(curve: pd.Series) -> float:
    """The mean over a run's first log lines (``ENDS`` of them); NaN where nothing was logged."""
    return float(curve.dropna().head(max(1, round(ENDS * curve.count()))).mean())


def at_end(curve: pd.Series) -> float:
    """The mean over a run's last log lines (``ENDS`` of them); NaN where nothing was logged."""
    return float(curve.dropna().tail(max(1, round(ENDS * curve.count()))).mean())


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training run. ``label`` is unique on the page.

    ``metrics``: one row per log line, indexed by step; one column per name; NaN where a line lacks it. From run.json,
    and empty without it: ``strategy`` (what was built, ``Strategy.describe``), ``paths``, ``total_steps``,
    ``base_model``, and ``data``, its fingerprint.
    """

    folder: Path
    label: str
    metrics: pd.DataFrame
    strategy: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    base_model: str = ""
    data: str = ""

    @property
    def last_step(self) -> int:
        """The planned number of optimizer steps, or the last that was logged."""
        return max(self.total_steps, int(self.metrics.index[-1]))

    @property
    def has_teacher(self) -> bool:
        return "tidal/strength" in self.metrics

    @property
    def has_bridge(self) -> bool:
        return bool(self.paths.get("bridge"))

    def curve(self, name: str) -> pd.Series:
        """One number over steps, without the lines that lack it."""
        return self.metrics.get(name, pd.Series(dtype=float)).dropna()

    def by_bin(self, name: str) -> pd.DataFrame:
        """Columns ``name/0.0`` .. ``name/0.9`` under the lower edge of their bin; empty bins are absent."""
        bins = self.metrics.filter(regex=rf"^{name}/0\.\d$").dropna(how="all")
        return bins.rename(columns=lambda column: float(column.rpartition("/")[2])).sort_index(axis=1)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """scores.json. Numbers for figures, text for tables.

    ``models``: one row per model: name, side, bits_per_byte.value, .low and .high, likewise ``minus``, the difference
    to the first baseline (NaN where it was not measured). ``by_timestep``, per model: columns low and high (of t),
    ``BITS``, and its interval, ``BITS``_low and ``BITS``_high. ``cells``: per model, the row of the table by column.
    ``parallelism``: benchmarks at several thresholds. ``completions``: per prompt, the prompt, its reference and the
    answers by model. ``settings``: likelihoods under equal settings can be compared.
    """

    models: pd.DataFrame
    by_timestep: list[pd.DataFrame]
    cells: list[dict[str, str]]
    completions: list[dict[str, Any]]
    benchmarks: list[list[str]]
    parallelism: list[Point]
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder given to the report.

    ``prefix``: for names beside other runs. ``split``: how its corpus was split and why, or empty. ``notes``: what is
    missing, by section.
    """

    folder: Path
    label: str
    prefix: str
    trainings: list[TrainingRun]
    scores: Scores | None
    split: str
    completions: list[dict[str, Any]]
    inference: dict[str, Any] | None
    stages: pd.DataFrame
    notes: dict[str, list[str]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of ``folders`` under unique labels.

    Raises:
        ValueError: a folder is missing, given twice, or holds nothing to show.
    """
    resolved = [folder.resolve() for folder in folders]
    twice = next((folder for place, folder in enumerate(resolved) if folder in resolved[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice}: given twice; name each run once")
    names = [folder.name for folder in resolved]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    return [read_run(folder, label, alone=len(names) == 1) for folder, label in zip(resolved, labels)]


def read_run(folder: Path, label: str, alone: bool = True) -> Run:
    """One folder; beside others, not ``alone``, the names of its parts begin with its label.

    Raises:
        ValueError: the folder is missing or holds nothing to show.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a recipe's folder (runs/NAME) or a training run's")
    reader = _Reader(folder, printable(label), alone)
    scores = reader.part("scores", "scores.json", EVALUATE, reader.scores)
    run = Run(
        folder=folder,
        label=reader.label,
        prefix=reader.prefix,
        trainings=reader.trainings(),
        scores=scores,
        split=reader.split(),
        completions=reader.completions(instead=bool(scores and scores.completions)),
        inference=reader.part("inference", INFERENCE, INFERENCE_COMMAND, inference),
        stages=reader.stages(),
        notes=reader.notes,
    )
    if not (run.trainings or run.scores or run.completions or run.inference):
        raise ValueError(
            f"{folder}: nothing to report: no {METRICS} here or one folder below, and no scores.json, "
            f"completions.jsonl or {INFERENCE} that can be read"
        )
    return run


class _Reader:
    """Reads the parts of one folder and notes missing or corrupt files."""

    def __init__(self, folder: Path, label: str, alone: bool) -> None:
        self.folder, self.label = folder, label
        self.prefix = "" if alone else f"{label}/"
        self.notes: dict[str, list[str]] = {}

    def note(self, section: str, text: str) -> None:
        text = text.replace(f"{self.folder}/", "")
        self.notes.setdefault(section, []).append(f"{self.label}: {text}" if self.prefix else text)

    def rows(self, section: str, path: Path) -> list[dict[str, Any]]:
        """The rows of a JSON Lines file; a note counts the unreadable ones (a killed process leaves one)."""
        bad: list[str] = []
        rows = [row for _, row in read_rows(path, bad)]
        if bad:
            self.note(section, f"lines left out: {len(bad)}, the first: {printable(bad[0])}")
        return rows

    def part(self, section: str, file: str, writer: str, read: Callable[[Path], Any]) -> Any:
        """What ``read`` makes of ``file``; None, and a note, where it is missing or corrupt."""
        path = self.folder / file
        try:
            if path.is_file():
                return read(path)
            self.note(section, f"no {file} here: {writer} writes it")
        except Exception as error:  # whatever a corrupt file causes: it is named, and the rest is shown
            text = reason(error)
            self.note(section, text if str(path) in text else f"{file}: not what {writer} writes ({text})")
        return None

    def trainings(self) -> list[TrainingRun]:
        own = self.folder / METRICS
        paths = (
            [own] if own.is_file() else [path for path in sorted(self.folder.glob(f"*/{METRICS}")) if path.is_file()]
        )
        if not paths:
            self.note("runs", f"no {METRICS} here or one folder below: {DISTILL} writes it")
        found = [self._training(path) for path in paths]
        return [training for training in found if training is not None]

    def _training(self, path: Path) -> TrainingRun | None:
        name = printable(path.parent.name)
        label = self.label if self.prefix and path.parent == self.folder else f"{self.prefix}{name}"
        metrics = self.part("runs", str(path.relative_to(self.folder)), DISTILL, self.metrics)
        if metrics is None:
            return None
        described: dict[str, Any] = {}
        try:
            described = _description(read_json(path.with_name("run.json")))
        except Exception:  # a run without its description still has curves
            self.note("runs", f"{name}: no run.json that can be read, so its flags are not known")
        return TrainingRun(folder=path.parent, label=label, metrics=metrics, **described)

    def metrics(self, path: Path) -> pd.DataFrame:
        rows = [
            {name: float(value) for name, value in row.items() if name.isascii() and _is_number(value)}
            for row in self.rows("runs", path)
        ]
        rows = [row for row in rows if "step" in row and len(row) > 1]
        if not rows:
            raise ValueError(f"{path}: holds no number that can be read")
        names = len(set().union(*rows))
        if names * len(rows) > MOST_VALUES:
            raise ValueError(f"{path}: {len(rows)} lines with {names} names in all, which no run has")
        return pd.DataFrame(rows).set_index("step").sort_index(kind="stable")

    def completions(self, instead: bool) -> list[dict[str, Any]]:
        """Those of completions.jsonl; it may be missing where scores.json holds others ``instead``."""
        if instead and not (self.folder / ANSWERS).exists():
            return []
        return self.part("completions", ANSWERS, GENERATE, self._completions) or []

    def _completions(self, path: Path) -> list[dict[str, Any]]:
        return [
            {
                "prompt": str(row["prompt"]).strip(),
                "answer": str(row["answer"]).rstrip(),
                "finished": bool(row["finished"]),
                "reference": row.get("reference"),
            }
            for row in self.rows("completions", path)
        ]

    def split(self) -> str:
        if not (self.folder / CORPUS).is_file():  # another recipe's data
            return ""
        return self.part("scores", CORPUS, CORPUS_COMMAND, _split) or ""

    def scores(self, path: Path) -> Scores:
        content = read_json(path)
        models, benchmarks = content.get("models", []), content.get("benchmarks", [])
        if not (models or benchmarks):
            raise ValueError(f"{path}: holds no score; {EVALUATE} writes some")
        numbers = [f"{name}.{end}" for name in ("bits_per_byte", "minus") for end in ("value", "low", "high")]
        first = [{**model, "minus": next(iter((model.get("minus") or {}).values()), {})} for model in models]
        frame = pd.json_normalize(first).reindex(columns=["name", "side", *numbers])
        names = [f"{self.prefix}{printable(name)}" for name in frame["name"]]
        series = pd.Series(names, dtype=str, name="name")
        return Scores(
            models=pd.concat([series, frame["side"], _finite(frame[numbers].astype(float))], axis=1),
            by_timestep=[_timesteps(model["by_timestep"]) for model in models],
            cells=[score_cells(model) | {"model": name} for name, model in zip(names, models)],
            completions=_answers(content, names) if "completions" in content else [],
            benchmarks=[_benchmark(self.prefix, one, score) for one in benchmarks for score in one["scores"]],
            parallelism=[replace(one, model=f"{self.prefix}{printable(one.model)}") for one in points(benchmarks)],
            settings=_likelihood_settings(content) if models else {},
        )

    def stages(self) -> pd.DataFrame:
        stages, corrupt = read_stages(self.folder)
        for text in corrupt:
            self.note("time", text)
        return stages


def _likelihood_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Settings and data of likelihoods; files from before there was a choice of noise have one timestep per sample."""
    return {"likelihood_noise": "sample", **content["settings"], "data": content["data"]["fingerprint"]}


def read_stages(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """Name, seconds and peak_process_bytes of a recipe's stages in the order they finished; and what cannot be read.

    Stages that the last run does not have are left out, and those that it has not come to again.
    """
    rows: list[tuple[str, float, float, float]] = []
    corrupt: list[str] = []
    paths, plan = sorted(folder.glob(f"{STAMPS}/*.json")), None
    if (folder / STAMPS / STAGES).exists():
        try:
            plan = read_json(folder / STAMPS / STAGES, form={"stages": [str]})["stages"]
            paths = sorted((path for path in paths if path.stem in plan), key=lambda path: plan.index(path.stem))
        except ValueError as error:
            corrupt.append(reason(error))
    for path in paths:
        try:
            stamp = read_json(path)
            seconds, peak, finished = (float(stamp[key]) for key in ("seconds", "peak_process_bytes", "finished"))
            if plan is None or finished >= max((row[3] for row in rows), default=finished):
                rows.append((printable(path.stem), seconds, peak, finished))
        except Exception as error:
            corrupt.append(f"{path}: not a stage's stamp ({reason(error)})")
    table = pd.DataFrame(rows, columns=["name", "seconds", "peak_process_bytes", "finished"])
    return table.sort_values("finished", kind="stable").drop(columns="finished"), corrupt


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < LARGEST  # false for NaN as well


def _finite(table: pd.DataFrame) -> pd.DataFrame:
    return table.where(table.abs() < LARGEST)


def _description(run: dict[str, Any]) -> dict[str, Any]:
    """What is shown of run.json, by the fields of ``TrainingRun``."""
    return {
        "strategy": dict(run.get("strategy") or {}),
        "paths": dict((run.get("config") or {}).get("paths") or {}),
        "total_steps": int(run.get("total_steps") or 0),
        "base_model": str(run.get("model_folder", "")),
        "data": str(run.get("data_fingerprint", "")),
    }


def _split(path: Path) -> str:
    split = read_json(path)["split"]
    return textwrap.shorten(printable(f"split by {split['by']}: {split['why']}"), 300)


def _answers(content: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """``Scores.completions``; an answer: the model's name with the verdicts, and the text."""
    asked, judged = content["completions"], [model["completions"]["texts"] for model in content["models"]]
    return [
        {
            "prompt": str(prompt).strip(),
            "reference": str(reference).rstrip(),
            "answers": [(f"{name} ({_verdict(one)})", str(one["text"]).rstrip()) for name, one in zip(names, answers)],
        }
        for prompt, reference, *answers in zip(asked["prompts"], asked["references"], *judged)
    ]


def _verdict(judged: dict[str, Any]) -> str:
    parses = "parses" if judged["parses"] else "does not parse"
    return f"{parses}, {'says something' if judged['says_something'] else 'says little'}"


def _timesteps(bins: list[dict[str, float]]) -> pd.DataFrame:
    """``Scores.by_timestep`` of one model. An older version wrote no intervals: there they are the number itself."""
    table = pd.DataFrame(bins, columns=["low", "high", BITS, f"{BITS}_low", f"{BITS}_high"], dtype=float)
    return _finite(table.ffill(axis=1))


def _benchmark(prefix: str, benchmark: dict[str, Any], score: dict[str, Any]) -> list[str]:
    metric = ", ".join(str(word) for word in (score["metric"], score["filter"]) if word not in ("", "none"))
    value, low, high = (float(score[end]) for end in ("value", "low", "high"))
    interval = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    name = str(benchmark["benchmark"]) + threshold_of(benchmark)
    return [f"{prefix}{benchmark['model']}", name, metric, str(score["n"]), interval]
