"""The page's sections: for each, the figures and tables of the runs, and a line for whatever is missing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from megatron_tide import __version__
from megatron_tide.evaluate import Estimate
from megatron_tide.release.card import public_name
from megatron_tide.report import figures
from megatron_tide.report.alignment import alignment, pairs_of
from megatron_tide.report.efficiency import footprint_parts
from megatron_tide.report.page import Page, note, preformatted, table, words
from megatron_tide.report.reading import Run, Score, Training
from megatron_tide.report.style import looks as looks_of

COMPLETIONS = 6  # of each run
NOTHING = "–"


def build_page(runs: Sequence[Run]) -> Page:
    """The whole page of one run, or of several beside each other."""
    trainings = [training for run in runs for training in run.trainings]
    looks = looks_of([training.label for training in trainings])
    title = " against ".join(run.label for run in runs)
    page = Page(f"Distillation report: {title}", f"megatron_tide {__version__}, {time.strftime('%Y-%m-%d %H:%M')}")
    page.add("runs", "What was trained", _what(runs))
    page.add("loss", "Loss over steps", _losses(page, trainings, looks))
    page.add("scores", "Held-out scores", _scores(page, runs))
    page.add("tidal", "TIDAL strength", _tidal(page, trainings, looks))
    page.add("chunks", "The teacher's chunk probabilities", _chunks(page, trainings))
    page.add("timestep", "Denoising loss by timestep", _by_timestep(page, runs, looks))
    page.add("time", "Time and memory of training", _time_and_memory(page, runs))
    page.add("footprint", "Memory and speed, student against teacher", footprint_parts(runs))
    page.add("completions", "Sample completions", _completions(runs))
    page.add("alignment", "How the two tokenizers meet", _alignment(page, runs))
    return page


def _notes(runs: Sequence[Run], part: str) -> Iterator[str]:
    for run in runs:
        if part in run.notes:
            yield note(run.notes[part] if len(runs) == 1 else f"{run.label}: {run.notes[part]}")


def _name(runs: Sequence[Run], run: Run, name: str) -> str:
    """A model's name on the page: the label that its training run has, where there is one."""
    return name if len(runs) == 1 else f"{run.label}/{name}"


def _what(runs: Sequence[Run]) -> Iterator[str]:
    trainings = [training for run in runs for training in run.trainings]
    yield from _notes(runs, "trainings")
    if not trainings:
        return
    yield words(
        "One row a training run. Losses are means over its last log lines (a fifth of them); the distillation loss is "
        "not comparable between objectives."
    )
    knobs = ("strategy", "chunks", "rows", "TIDAL", "CompDemo", "T", "steps")
    head = ("run", *knobs, "total", "denoising", "distillation")
    yield table(head, (_what_row(training) for training in trainings))
    for training in trainings:
        if not training.run:
            yield note(f"{training.label}: no run.json that can be read, so its knobs are not known")


def _what_row(training: Training) -> list[str]:
    built = training.strategy
    tidal = {built.get("chunk_tidal", "off"), built.get("distribution_tidal", "off")} - {"off"}
    losses = [_last(training, f"loss/{part}", ".4f") for part in ("total", "denoise", "distill")]
    return [
        training.label,
        str(built.get("strategy", NOTHING)),
        _word(built.get("chunk_objective")),
        _word(built.get("distribution_objective")),
        ", ".join(sorted(tidal)) or NOTHING,
        "yes" if built.get("compdemo") else NOTHING,
        f"{built['temperature']:g}" if "temperature" in built else NOTHING,
        f"{max(curve.steps[-1] for curve in training.curves.values())} of {training.total_steps}",
        *(losses if training.listens else [*losses[:2], NOTHING]),
    ]


def _groups(trainings: Sequence[Training]) -> list[list[Training]]:
    """Runs that began from one model on one data set, together; groups with a teacher first, then the larger ones."""
    groups: dict[tuple[str, str], list[Training]] = {}
    for training in trainings:
        groups.setdefault(training.beginning(), []).append(training)
    return sorted(groups.values(), key=lambda group: (not any(one.listens for one in group), -len(group)))


def _losses(page: Page, trainings: Sequence[Training], looks: figures.Looks) -> Iterator[str]:
    groups = [group for group in _groups(trainings) if figures.has_losses(group)]
    if not groups:
        yield note("no loss was logged: python -m megatron_tide.distill writes metrics.jsonl")
    for number, group in enumerate(groups, 1):
        who = ", ".join(training.label for training in group)
        caption = f"{who}: begun from {public_name(group[0].beginning()[0])}"
        if len(group) > 1:
            caption += ", on the same data; with the same seed, under the same noise"
        yield page.picture(f"loss-{number}", figures.losses(group, looks), f"{caption}.")


def _scores(page: Page, runs: Sequence[Run]) -> Iterator[str]:
    rows = [(_name(runs, run, score.name), score) for run in runs if run.scores for score in run.scores.models]
    if rows:
        bounds = [run.scores for run in runs if run.scores and run.scores.models]
        settings = {(scores.data, str(sorted(scores.settings.items()))) for scores in bounds}
        samples = ", ".join(str(scores.settings.get("samples", "?")) for scores in bounds)
        caption = (
            f"Bound on bits per byte over held-out samples ({samples}), blue: students, orange: teachers. An interval "
            "that holds zero on the right says that the data do not tell the model from the first student."
        )
        yield page.picture("scores", figures.scores(rows), caption)
        if len(settings) > 1:
            yield note("these runs were scored on other data or settings: compare within a run, not across")
        head = ("model", "side", "bits per byte", "less the first student", "masked-token accuracy")
        yield table(head, (_score_row(label, score) for label, score in rows))
    asked = [
        [_name(runs, run, one.model), one.name, one.metric, str(one.n), _interval(one.mean)]
        for run in runs
        if run.scores
        for one in run.scores.benchmarks
    ]
    if asked:
        yield words("Benchmarks: a mean over samples, with its 95 % interval.")
        yield table(("model", "benchmark", "metric", "samples", "score"), asked)
    yield from _notes(runs, "scores")


def _score_row(label: str, score: Score) -> list[str]:
    less = NOTHING if score.less is None else f"{score.less:+}"
    return [label, score.side, f"{score.bits}", less, _interval(score.accuracy)]


def _tidal(page: Page, trainings: Sequence[Training], looks: figures.Looks) -> Iterator[str]:
    curves: dict[str, list[Training]] = {}
    for training in trainings:
        if training.has_tidal:
            values = [f"{name} {training.strategy[f'tidal_{name}']}" for name in ("axes", "ramp", "init", "peak")]
            curves.setdefault(", ".join(values), []).append(training)
    if not curves:
        yield note("no training run here uses TIDAL (--tidal mix or weight, or a strategy that has it)")
        return
    yield words(
        "How strongly the student listens: λ mixes the target or weighs the loss. Right: what the knobs foretell as a "
        "mean over timesteps, and the mean over the samples that were drawn."
    )
    for number, (knobs, group) in enumerate(curves.items(), 1):
        who = ", ".join(training.label for training in group)
        yield page.picture(f"tidal-{number}", figures.tidal(group, looks), f"{who}: {knobs}.")


def _chunks(page: Page, trainings: Sequence[Training]) -> Iterator[str]:
    scoring = [training for training in trainings if "chunk/teacher_prob" in training.curves]
    if not scoring:
        yield note("no training run here scores chunks (--chunk-objective, or a strategy that has one)")
        return
    yield words(
        "p = exp(LP / T) is how likely a side finds a whole chunk. The teacher is frozen: its p move with the samples "
        "and masks drawn; the student's follow, or do not. Reverse CALM pushes chunks below the break-even down."
    )
    for training in scoring:
        if not training.by_bin("chunk/teacher_probability"):
            yield note(f"{training.label}: logged by a version without the chunk/teacher_probability bins")
            continue
        below = _last(training, "chunk/below_break_even", ".0%")
        caption = (
            f"{training.label}: share of active chunks by the teacher's p over steps; at the start and at the end of "
            f"the run (a fifth of its log lines each); what the student gives those chunks. {below} lie below the "
            "break-even at the end."
        )
        yield page.picture(f"chunks-{training.label}", figures.chunk_probabilities(training), caption)


def _by_timestep(page: Page, runs: Sequence[Run], looks: figures.Looks) -> Iterator[str]:
    trainings = [one for run in runs for one in run.trainings if one.by_bin("denoise_by_timestep")]
    held_out = [(_name(runs, run, score.name), score) for run in runs if run.scores for score in run.scores.models]
    groups: list[list[Training]] = _groups(trainings) or ([[]] if held_out else [])
    if not groups:
        yield note("no denoising loss by timestep was logged, and there is no scores.json")
    for number, group in enumerate(groups, 1):
        shown = held_out if number == 1 else []
        whose = [training.label for training in group] + ["held out"] * bool(shown)
        caption = f"How hard masked tokens are where a share t of a response is masked: {', '.join(whose)}."
        yield page.picture(f"timestep-{number}", figures.denoising_by_timestep(group, shown, looks), caption)


def _time_and_memory(page: Page, runs: Sequence[Run]) -> Iterator[str]:
    timed = [one for run in runs for one in run.trainings if "time/student_share" in one.curves]
    if timed:
        caption = (
            "Teacher and student parts of the optimizer steps at the end of each run. Seconds a step are wall time, "
            "with reading and logging."
        )
        yield page.picture("time", figures.time_and_memory(timed), caption)
        head = ("run", "s a step", "tokens/s", "teacher", "student", "process, GiB", "GPU, GiB", "pipeline bubble")
        yield table(head, (_time_row(training) for training in timed))
    else:
        yield note("no share of time was logged: python -m megatron_tide.distill writes metrics.jsonl")
    for run in runs:
        if run.stages:
            minutes = sum(stage.seconds for stage in run.stages) / 60
            caption = f"{run.label}: {minutes:.1f} minutes in {len(run.stages)} stages, in the order they finished."
            yield page.picture(f"stages-{run.label}", figures.stages(run.stages), caption)


def _time_row(training: Training) -> list[str]:
    gib = [_last(training, f"memory/{part}_peak_bytes", ".2f", 2**30) for part in ("host", "device")]
    shares = [_last(training, name, ".0%") for name in ("time/teacher_share", "time/student_share")]
    speed = [_last(training, "time/step_s", ".3g"), _last(training, "speed/tokens_per_s", ",.0f")]
    return [training.label, *speed, *shares, *gib, _last(training, "teacher/pipeline_bubble", ".0%")]


def _completions(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for number, one in enumerate(run.completions[:COMPLETIONS], 1):
            yield preformatted(_name(runs, run, f"prompt {number}"), one.prompt.strip())
            ending = "" if one.finished else " (cut at the longest allowed)"
            yield preformatted(f"answer{ending}", one.answer.rstrip() or "(nothing)")
            if one.reference is not None:
                yield preformatted("on record", one.reference.rstrip())
        if len(run.completions) > COMPLETIONS:
            yield words(f"{len(run.completions) - COMPLETIONS} more are in {run.label}/completions.jsonl.")
    yield from _notes(runs, "completions")


def _alignment(page: Page, runs: Sequence[Run]) -> Iterator[str]:
    """A picture a run: of its first training that a bridge belongs to."""
    for run in runs:
        bridged = [training for training in run.trainings if training.paths.get("bridge")]
        if not bridged:
            yield note(f"{run.label}: no training run here was given a bridge (--bridge), so there is nothing to align")
            continue
        try:
            pairs = pairs_of(bridged[0], run.folder)
        except ValueError as error:
            yield note(f"{run.label}: {error}")
            continue
        caption = (
            f"{run.label}: beginnings of responses it was trained on. A chunk is the shortest stretch that ends where "
            "a token ends on both sides; dots are spaces."
        )
        yield page.picture(f"alignment-{run.label}", alignment(pairs), caption)


def _last(training: Training, name: str, spec: str, unit: float = 1.0) -> str:
    curve = training.curves.get(name)
    return NOTHING if curve is None else format(curve.last() / unit, spec)


def _word(value: object) -> str:
    return NOTHING if value in (None, "none") else str(value).replace("_", " ")


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
