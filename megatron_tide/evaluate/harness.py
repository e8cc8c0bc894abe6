"""Benchmarks through lm-eval: one task or group for one model, its answers cached, its programs judged in the sandbox.

lm-eval brings prompts, filters and metrics; its own bootstrap is replaced by ours, over the samples of all subtasks
together. Answers are in its response cache as soon as their batch is done: a killed evaluation, run again, continues.
The cache file is named by the model's fingerprint and a secret of this user, so that a model folder from elsewhere
cannot bring answers and verdicts along; its keys hold prompt and generation settings.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import secrets
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset, own_settings, published_row
from megatron_tide.evaluate.bootstrap import Estimate, mean, ratio
from megatron_tide.evaluate.task_functions import PROGRAMS, tested_names
from megatron_tide.evaluate.task_index import task_errors, task_manager
from megatron_tide.files import atomic_write, check_form, create_new, fingerprint, read_regular, sha256_file
from megatron_tide.sandbox import LIMITS, WORKER, require_sandbox, run_programs

PASS_AT = (1, 10, 100)
NOT_INSTALLED = re.compile(r"ModuleNotFoundError: No module named '(\w+)")
PROGRAMS_AT_ONCE = 64  # verdicts are in the cache after so many programs

Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """One model under evaluation: where its results are kept, and what is the same for all benchmarks."""

    name: str
    path: str
    generator: Any
    """The model at ``path``, called ``name``: a ``generators.Generator``."""
    folder: Path
    seed: int = 0
    limit: int = 0
    """Samples of each task, from its beginning; 0 for all."""
    samples_per_problem: int = 1
    workers: int = 0
    """Programs run at a time; 0 for one per core."""
    unsafe_programs: bool = False
    include_path: Sequence[str] = ()
    """Folders with further tasks of lm-eval."""

    def __post_init__(self) -> None:
        if self.samples_per_problem < 1 or self.limit < 0 or self.workers < 0:
            raise ValueError("evaluate: samples per problem must be 1 or more, a limit and workers 0 or more")

    def settings(self, preset: BenchmarkPreset) -> dict[str, Any]:
        """Everything that decides the answers of a benchmark."""
        return {
            "model": self.generator.fingerprint,
            "task": preset.task,
            "few_shot": preset.few_shot,
            "chat_template": preset.chat_template,
            "thinking": self.generator.thinking,
            "seed": self.seed if preset.temperature else None,
            "decoder": self.generator.decoder,
            **self.generator.settings(preset),
        }


@dataclass(frozen=True)
class MetricScore:
    """One number of a benchmark: a mean over ``n`` samples, 0 to 1."""

    metric: str
    filter: str
    estimate: Estimate
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "filter": self.filter, "n": self.n, **self.estimate.to_dict()}


@dataclass(frozen=True)
class BenchmarkResult:
    """One model's scores on one benchmark."""

    model: str
    path: str
    benchmark: str
    preset: BenchmarkPreset
    scores: list[MetricScore]
    settings: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)
    """What a reader of the scores should know."""
    tokens_per_pass: Estimate | None = None
    """Tokens written per forward pass of an answer; None where answers are not written."""

    def published(self, score: MetricScore) -> dict[str, float]:
        """The published numbers that belong beside ``score``; empty for all but the headline."""
        return published_row(self.benchmark) if (score.metric, score.filter) == self.preset.headline else {}

    def to_dict(self) -> dict[str, Any]:
        """Every number with the settings behind it and the published ones."""
        scores = [{**score.to_dict(), "published": self.published(score) or None} for score in self.scores]
        return {**asdict(self), "task": self.preset.task, "scores": scores}


def check_benchmarks(
    presets: Mapping[str, BenchmarkPreset],
    *,
    samples_per_problem: int,
    unsafe_programs: bool,
    include_path: Sequence[str],
) -> None:
    """Check packages, task names and the sandbox before a model is opened.

    Raises:
        ValueError: naming what is missing.
    """
    for name, preset in presets.items():
        task_manager(preset, include_path)
        judged = preset.task in PROGRAMS
        if judged:
            require_sandbox(unsafe_programs)
        if samples_per_problem > 1 and not judged:
            raise ValueError(f"{name}: several samples per problem are for tasks with programs only (humaneval, mbpp)")
        if samples_per_problem > 1 and not preset.temperature:
            raise ValueError(f"{name}: at temperature 0 several samples are all the same; add --temperature 0.8, say")


def run_benchmark(benchmark: str, preset: BenchmarkPreset, context: EvalContext) -> BenchmarkResult:
    """Every (metric, filter) of one task or group over all its samples; cached answers are not generated again.

    Raises:
        ValueError: lm-eval is missing, the task is unknown or does not generate, its data cannot be had, or this
            machine has no working sandbox for its programs.
    """
    started, manager = time.perf_counter(), task_manager(preset, context.include_path)
    if preset.task in PROGRAMS:
        require_sandbox(context.unsafe_programs)
    from megatron_tide.evaluate.response_cache import ResponseCache

    path = context.folder / f"cache-{fingerprint([user_secret(), context.generator.fingerprint])[:32]}.sqlite"
    try:
        with ResponseCache(context.generator, path) as cache:
            with task_errors(preset.task):
                loaded = manager.load([preset.task])
                presets, notes = _own_settings(loaded["tasks"], preset)
                draws = []
                for draw in range(context.samples_per_problem):
                    samples, of_metrics = _evaluate(loaded, cache, presets, context, draw)
                    draws.append(samples)
            notes += of_metrics
            rows = [_row(same) for same in zip(*draws)]
            notes += _notes_of_answers(rows)
            if preset.task in PROGRAMS:
                _judge(preset.task, rows, cache, context)
                notes += _not_installed(rows)
    except (OSError, ImportError) as error:  # data sets that cannot be downloaded, packages that a task needs
        raise ValueError(f"task {preset.task}: {' '.join(str(error).split())[:300]}") from None
    preset = max(presets.values(), key=lambda one: one.new_tokens or 0)
    settings = context.settings(preset)
    if len({*presets.values()}) > 1:
        settings["max_new_tokens"] = {name: one.new_tokens for name, one in presets.items()}
    # A look at a few samples does not take the place of the file of all.
    part = [context.limit, context.samples_per_problem]
    asked = fingerprint(settings if part == [0, 1] else [settings, *part])
    _write_samples(rows, settings, context.folder / f"{preset.task}-{asked[:12]}.jsonl")
    seconds = time.perf_counter() - started
    return BenchmarkResult(
        model=context.name,
        path=context.path,
        benchmark=benchmark,
        preset=preset,
        scores=_scores(rows, context.seed),
        settings=settings,
        seconds=seconds,
        notes=notes,
        tokens_per_pass=_tokens_per_pass(rows, context.seed),
    )


def user_secret() -> str:
    """A random text that this user's evaluations share, kept in the user's cache folder; made on first use.

    Raises:
        ValueError: it can be neither read nor written.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    path = (Path(base) if base else Path.home() / ".cache") / "megatron_tide" / "evaluation-secret"
    draft = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(create_new(draft), "w") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(draft, path)
            draft.unlink()
        found = read_regular(path, 65).decode("ascii", "replace")
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{path}: cannot be read or written ({error}); set XDG_CACHE_HOME to a folder of your own"
        ) from None
    if len(found) != 64:
        raise ValueError(f"{path}: is corrupt; remove it (answers that were kept are then generated again)")
    return found


def _own_settings(tasks: Mapping[str, Any], preset: BenchmarkPreset) -> tuple[dict[str, BenchmarkPreset], list[str]]:
    """The preset of each subtask, with the task's own settings where it leaves them open; and what is not used."""
    found = {
        name: own_settings(preset, name, task.get_config("generation_kwargs") or {}) for name, task in tasks.items()
    }
    unused = {name: parts for name, (_, parts) in found.items() if parts}
    notes = [f"task {name}: its settings {', '.join(parts)} are not used" for name, parts in unused.items()]
    return {name: own for name, (own, _) in found.items()}, notes


def _evaluate(
    loaded: Any, lm: Any, presets: Mapping[str, BenchmarkPreset], context: EvalContext, draw: int
) -> tuple[list[Sample], list[str]]:
    """lm-eval's samples of all subtasks, one for each document and filter; ``draw`` counts the samples per problem.
    And a note on each of its numbers that is not a mean over samples, which ours are.
    """
    from lm_eval import evaluate

    for name, task in loaded["tasks"].items():
        preset = presets[name]
        settings = {"chat_template": preset.chat_template, **context.generator.settings(preset)}
        if preset.temperature:
            settings |= {"seed": context.seed, "sample": draw}
        if preset.few_shot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", preset.few_shot or 0)
        task.set_fewshot_seed(seed=context.seed)
        until = (task.get_config("generation_kwargs") or {}).get("until") or []
        task.set_config("generation_kwargs", {"until": [until] if isinstance(until, str) else until, **settings})
    results = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=context.limit or None,
        bootstrap_iters=0,
        apply_chat_template=preset.chat_template,
        fewshot_as_multiturn=preset.chat_template,
    )
    assert results is not None
    notes = [] if PROGRAMS.keys() & loaded["tasks"].keys() else [*_other_numbers(results)]
    return [{**sample, "task": name} for name, samples in results["samples"].items() for sample in samples], notes


def _other_numbers(results: Mapping[str, Any]) -> Iterator[str]:
    for name, samples in results["samples"].items():
        for key, value in results["results"][name].items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            own = [sample.get(metric) for sample in samples if sample["filter"] == kind]
            numbers = [number for number in own if isinstance(number, int | float)]
            if len(numbers) < len(own) or not np.isclose(np.mean(numbers), value, equal_nan=True):
                yield f"task {name}: its {metric} ({kind}) is not a mean over samples; lm-eval has {value:.4g}"


def _row(draws: Sequence[Sample]) -> Sample:
    """What is kept of one document under one filter; ``draws``: its samples, one per draw."""
    first = draws[0]
    numbers = {name: first[name] for name in first["metrics"] if isinstance(first[name], int | float)}
    return {
        "key": f"{first['task']}/{first['doc_id']}",
        "filter": first["filter"],
        "prompt": first["arguments"][0][0],
        "doc": first["doc"],
        "answers": [response for sample in draws for responses in sample["resps"] for response in responses],
        "filtered": [answer for sample in draws for answer in sample["filtered_resps"]],
        "scores": {name: float(value) for name, value in numbers.items()},  # some metrics are not per sample
    }


def _judge(task: str, rows: Sequence[Sample], cache: Any, context: EvalContext) -> None:
    """Run the programs of all answers; adds ``verdicts`` and pass@k to each row. Verdicts are cached like answers."""
    programs = [
        [(PROGRAMS[task](row["doc"], answer), tested_names(row["doc"])) for answer in row["filtered"]] for row in rows
    ]
    strict, count = not context.unsafe_programs, context.samples_per_problem
    installed = _installed()
    keys = [[fingerprint([*program, vars(LIMITS), strict, installed]) for program in many] for many in programs]
    todo = {key: one for many in zip(keys, programs) for key, one in zip(*many) if key not in cache.dbdict}
    items = list(todo.items())
    for first in tqdm(range(0, len(items), PROGRAMS_AT_ONCE), desc="Running programs", disable=False):
        part = items[first : first + PROGRAMS_AT_ONCE]
        parts, tested = zip(*(program for _, program in part))
        outcomes = run_programs(parts, LIMITS, workers=context.workers, strict=strict, tested=tested)
        cache.dbdict.update({key: vars(outcome) for (key, _), outcome in zip(part, outcomes)})
    for row, many in zip(rows, keys):
        row["verdicts"] = [cache.dbdict[key] for key in many]
        for verdict in row["verdicts"]:
            check_form(verdict, {"passed": bool, "reason": str}, f"{cache.cache_db}: not a verdict:", "; remove it")
        passed = sum(verdict["passed"] for verdict in row["verdicts"])
        row["scores"] = {f"pass@{k}": pass_at_k(count, passed, k) for k in PASS_AT if k <= count}


def _tokens_per_pass(rows: Sequence[Sample], seed: int) -> Estimate | None:
    work = [
        np.array([[getattr(one, name, 0) for one in many] for name in ("tokens", "passes")], np.float64).sum(1)
        for many in {row["key"]: row["answers"] for row in rows}.values()
    ]
    tokens, passes = np.transpose(work)
    return ratio(tokens, passes, seed) if passes.all() else None


def _notes_of_answers(rows: Sequence[Sample]) -> list[str]:
    """What generators say of answers, such as those without an end of their thoughts, with their number."""
    answers = [answer for many in {row["key"]: row["answers"] for row in rows}.values() for answer in many]
    counts = Counter(note for answer in answers for note in getattr(answer, "notes", ()))
    return [f"{count} of {len(answers)} answers {note}" for note, count in counts.items()]


def _not_installed(rows: Sequence[Sample]) -> list[str]:
    """A note on the packages that programs wanted and this Python does not have."""
    reasons = [verdict["reason"] for row in rows for verdict in row["verdicts"]]
    wanted = Counter(found[1] for reason in reasons if (found := NOT_INSTALLED.match(reason)))
    if not wanted:
        return []
    counts = ", ".join(f"{name} ({count})" for name, count in wanted.most_common(5))
    return [f"programs failed because they import what is not installed: {counts}"]


def _installed() -> str:
    """What decides a verdict besides the program: Python, the installed packages, the sandbox."""
    packages = sorted({f"{one.name} {one.version}" for one in importlib.metadata.distributions()})
    own = [sha256_file(path) for path in sorted(WORKER.parent.rglob("*.py"))]
    return fingerprint([sys.version, packages, own])


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1, unbiased)."""
    assert 0 <= passed <= samples
    assert 1 <= k <= samples
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def _write_samples(rows: Sequence[Sample], settings: dict[str, Any], path: Path) -> None:
    """JSON lines: the settings, then one line per document and filter."""
    shown = [{name: value for name, value in row.items() if name not in ("doc", "filtered")} for row in rows]
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in ({"settings": settings}, *shown)]
    atomic_write(path, "".join(lines).encode("utf-8", "replace"))


def _scores(rows: Sequence[Sample], seed: int) -> list[MetricScore]:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        for metric, value in row["scores"].items():
            values[metric, row["filter"]].append(value)
    return [MetricScore(metric, name, mean(found, seed), len(found)) for (metric, name), found in values.items()]
