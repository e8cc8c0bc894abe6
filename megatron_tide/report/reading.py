"""What a run folder holds, typed. Whatever is missing or damaged is named, and never stops the rest.

A recipe's folder (``runs/NAME``) holds training runs one folder below, and beside them scores.json, completions.jsonl,
footprint.json, a bridge, and the stamps of its stages; a training run's own folder holds metrics.jsonl and run.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_tide.evaluate import Estimate
from megatron_tide.files import read_json
from megatron_tide.report.footprint import Footprint, read_footprint

METRICS, DESCRIPTION, STAGES = "metrics.jsonl", "run.json", ".stages"
ENDS = 0.2  # "at the start" and "at the end" of a run: this share of its log lines
FOOTPRINT_COMMAND = "python -m megatron_tide.report.footprint"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Curve:
    """One logged number over optimizer steps; both [n], in order of steps, without values that are not finite."""

    steps: list[int]
    values: list[float]

    def first(self) -> float:
        """The mean over the run's first lines (``ENDS`` of them)."""
        return _mean(self.values[: _some(self.values)])

    def last(self) -> float:
        """The mean over the run's last lines (``ENDS`` of them)."""
        return _mean(self.values[-_some(self.values) :])


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training run: ``label`` tells it from the others on the page, ``run`` is its run.json, or empty."""

    folder: Path
    label: str
    curves: dict[str, Curve]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> dict[str, Any]:
        """The objectives that were built, as recorded (``Strategy.describe``)."""
        return dict(self.run.get("strategy") or {})

    @property
    def paths(self) -> dict[str, Any]:
        return dict((self.run.get("config") or {}).get("paths") or {})

    @property
    def total_steps(self) -> int:
        """As planned, or as many as were logged."""
        logged = max((curve.steps[-1] for curve in self.curves.values()), default=1)
        return max(int(self.run.get("total_steps") or 0), logged)

    @property
    def listens(self) -> bool:
        """Whether a teacher was asked at all."""
        return "tidal/strength" in self.curves

    @property
    def has_tidal(self) -> bool:
        return "tidal_axes" in self.strategy

    def by_bin(self, name: str) -> dict[float, Curve]:
        """Curves ``name/0.0`` .. ``name/0.9`` by the lower end of their bin; bins that were never met are left out."""
        head = f"{name}/"
        return {float(key[len(head) :]): self.curves[key] for key in sorted(self.curves) if key.startswith(head)}

    def beginning(self) -> tuple[str, str]:
        """What runs must share for their losses to be compared: the model they began from, and their data."""
        return str(self.run.get("model_folder", self.folder)), str(self.run.get("data_fingerprint", ""))


@dataclass(frozen=True)
class Score:
    """One model of scores.json. ``less``: its bits per byte less the first student's, paired."""

    name: str
    side: str
    bits: Estimate
    accuracy: Estimate
    less: Estimate | None
    by_timestep: list[dict[str, float]]


@dataclass(frozen=True)
class Benchmark:
    """A number of a benchmark, a mean over ``n`` samples."""

    model: str
    name: str
    metric: str
    n: int
    mean: Estimate


@dataclass(frozen=True)
class Scores:
    """scores.json: likelihoods, benchmarks, or both.

    ``data``: the fingerprint of the held-out data, ``settings``: samples, draws, seed and the like; nothing where no
    likelihood was measured.
    """

    models: list[Score]
    benchmarks: list[Benchmark]
    data: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    prompt: str
    answer: str
    finished: bool
    reference: str | None


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    peak_bytes: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder given to the report. ``notes``: what is not there or cannot be read, by the part it belongs to."""

    folder: Path
    label: str
    trainings: list[Training]
    scores: Scores | None
    completions: list[Completion]
    footprint: Footprint | None
    stages: list[Stage]
    notes: dict[str, str]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of ``folders``, labelled so that no two of them, nor two of their trainings, are called the same.

    Raises:
        ValueError: a folder that is missing, given twice, or holds nothing to show.
    """
    resolved = [folder.resolve() for folder in folders]
    twice = next((folder for place, folder in enumerate(resolved) if folder in resolved[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice}: given twice; name each run once")
    names = [folder.name for folder in resolved]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    runs = [read_run(folder, label) for folder, label in zip(resolved, labels)]
    return runs if len(runs) == 1 else [_prefixed(run) for run in runs]


def read_run(folder: Path, label: str) -> Run:
    """One folder. ValueError, one line, where there is nothing at all to show."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a recipe's folder (runs/NAME) or a training run's")
    notes: dict[str, str] = {}

    def part(name: str, file: str, writer: str, read: Callable[[Path], Value], otherwise: Value) -> Value:
        try:
            if (folder / file).is_file():
                return read(folder / file)
            notes[name] = f"no {file} here: {writer} writes it"
        except ValueError as error:
            notes[name] = str(error)
        return otherwise

    run = Run(
        folder=folder,
        label=label,
        trainings=_trainings(folder),
        scores=part("scores", "scores.json", "tools/evaluate.py", _scores, None),
        completions=part("completions", "completions.jsonl", "tools/generate.py --json", _completions, []),
        footprint=part("footprint", "footprint.json", FOOTPRINT_COMMAND, read_footprint, None),
        stages=_stages(folder / STAGES),
        notes=notes,
    )
    if not (run.trainings or run.scores or run.completions or run.footprint):
        raise ValueError(
            f"{folder}: nothing to report: no {METRICS} here or one folder below, and no scores.json, "
            "completions.jsonl or footprint.json that can be read"
        )
    if not run.trainings:
        notes["trainings"] = f"no {METRICS} here or one folder below: python -m megatron_tide.distill writes it"
    return run


def _prefixed(run: Run) -> Run:
    """Several runs: a training is called by its run too, unless it is the run."""
    trainings = [
        replace(one, label=run.label if one.folder == run.folder else f"{run.label}/{one.label}")
        for one in run.trainings
    ]
    return replace(run, trainings=trainings)


def _trainings(folder: Path) -> list[Training]:
    own = folder / METRICS
    found = [own] if own.is_file() else sorted(folder.glob(f"*/{METRICS}"))
    trainings = []
    for path in found:
        try:
            run = read_json(path.parent / DESCRIPTION)
        except ValueError:  # a run without its description still has curves
            run = {}
        trainings.append(Training(folder=path.parent, label=path.parent.name, curves=_curves(path), run=run))
    return [training for training in trainings if training.curves]


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for entry in _lines(path):
        step = entry.pop("step", None)
        for name, value in entry.items():
            if isinstance(step, int) and isinstance(value, (int, float)) and math.isfinite(value):
                curve = curves.setdefault(name, Curve([], []))
                curve.steps.append(step)
                curve.values.append(float(value))
    return curves


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; a line that a killed run left half written is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines also splits on U+2028
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _scores(path: Path) -> Scores:
    content = read_json(path)
    try:
        models = [
            Score(
                name=str(model["name"]),
                side=str(model["side"]),
                bits=Estimate(**model["bits_per_byte"]),
                accuracy=Estimate(**model["masked_token_accuracy"]),
                less=Estimate(**model["minus_first_student"]) if model["minus_first_student"] else None,
                by_timestep=[_timestep(row) for row in model["by_timestep"]],
            )
            for model in content.get("models", [])
        ]
        benchmarks = [_benchmark(asked, score) for asked in content.get("benchmarks", []) for score in asked["scores"]]
        data, settings = (str(content["data"]["fingerprint"]), dict(content["settings"])) if models else ("", {})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what tools/evaluate.py writes ({error!r})") from None
    if not (models or benchmarks):
        raise ValueError(f"{path}: holds no score; tools/evaluate.py writes some")
    return Scores(models, benchmarks, data, settings)


def _timestep(row: dict[str, Any]) -> dict[str, float]:
    """A bin of t with its bits a masked token; the interval is the number itself where an older version kept none."""
    bits = float(row["bits_per_masked_token"])
    found = {"low": float(row["low"]), "high": float(row["high"]), "bits": bits}
    return found | {f"bits_{end}": float(row.get(f"bits_per_masked_token_{end}", bits)) for end in ("low", "high")}


def _benchmark(asked: dict[str, Any], score: dict[str, Any]) -> Benchmark:
    mean = Estimate(*(float(score[end]) for end in ("value", "low", "high")))
    metric = ", ".join(word for word in (score["metric"], score["filter"]) if word not in ("", "none"))
    return Benchmark(str(asked["model"]), str(asked["benchmark"]), metric, int(score["n"]), mean)


def _completions(path: Path) -> list[Completion]:
    try:
        return [
            Completion(str(row["prompt"]), str(row["answer"]), bool(row["finished"]), row.get("reference"))
            for row in _lines(path)
        ]
    except KeyError as error:
        raise ValueError(f"{path}: not what tools/generate.py --json writes (no {error})") from None


def _stages(folder: Path) -> list[Stage]:
    """The recipe's stages in the order they finished."""
    stamps = []
    for path in folder.glob("*.json"):
        try:
            stamp = read_json(path)
            stage = Stage(path.stem, float(stamp["seconds"]), float(stamp["peak_process_bytes"]))
            stamps.append((float(stamp["finished"]), stage))
        except (ValueError, KeyError, TypeError):  # being written, or of another version: only this bar is missing
            continue
    return [stage for _, stage in sorted(stamps, key=lambda item: item[0])]


def _some(values: Sequence[float]) -> int:
    return max(1, round(ENDS * len(values)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
