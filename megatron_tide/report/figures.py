"""The figures of curves and scores. Each function draws one from what ``run_folder`` read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from megatron_tide.evaluate.parallelism import Point, curves
from megatron_tide.objectives import tidal_strength
from megatron_tide.objectives.common import BINS
from megatron_tide.report.run_folder import BITS, TrainingRun, at_end, at_start
from megatron_tide.report.style import DASHES, MUTED, looks, new_figure, styled

Looks = Mapping[str, Mapping[str, Any]]
LOSSES = {  # name in the logs -> (title, unit)
    "loss/total": ("total loss", "nats per maskable token"),
    "loss/denoise": ("denoising", "nats per maskable token"),
    "loss/next_token": ("next token", "nats per token"),
    "loss/distill": ("distillation", "nats per chunk, weighted"),
    "distill/chunk": ("chunk objective, unweighted", "nats per chunk"),
    "distill/kl": ("distribution objective, unweighted", "nats per pair, times T²"),
    "validation/bits_per_byte": ("held out", "bits per byte"),
}
TEACHER_LOSSES = ("loss/total", "loss/distill")  # without a teacher: the denoising loss again, and zeros
SMOOTHED = 30  # a curve of at least so many log lines gets a running mean
GRID = 200  # points per side of the TIDAL map


def has_losses(trainings: Sequence[TrainingRun]) -> bool:
    return any(_shown(training, name) for training in trainings for name in LOSSES)


@styled
def losses(trainings: Sequence[TrainingRun], looks: Looks) -> Figure:
    """Loss parts over steps, one panel for each part that was logged."""
    parts = [name for name in LOSSES if any(_shown(training, name) for training in trainings)]
    figure, axes = _panels(len(parts), 2 if len(parts) in (2, 4) else 3, 2.6)
    for ax, name in zip(axes, parts):
        for training in trainings:
            if _shown(training, name):
                _line(ax, training.curve(name), training.label, looks[training.label])
        title, unit = LOSSES[name]
        ax.set(title=title, xlabel="optimizer step", ylabel=unit)
    _legend_below(figure, axes)
    return figure


@styled
def tidal(trainings: Sequence[TrainingRun], looks: Looks) -> Figure:
    """The strength over (progress, timestep) by the flags of ``trainings``, which are equal, and as logged."""
    chosen = {name: trainings[0].strategy[f"tidal_{name}"] for name in ("init", "peak", "ramp", "axes")}
    progress, t = np.linspace(0, 1, GRID), torch.linspace(1e-3, 1, GRID)
    strength = np.stack([tidal_strength(float(p), t, **chosen).numpy() for p in progress], axis=1)
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2)
    image = left.imshow(strength, origin="lower", extent=(0, 1, 0, 1), aspect="auto", vmin=0, vmax=1)
    left.grid(False)
    if strength.max() - strength.min() > 1e-3:
        levels = np.arange(0.1, 1.0, 0.1)
        lines = left.contour(progress, t.numpy(), strength, levels=levels, colors="white", linewidths=0.7)
        left.clabel(lines, fontsize=7, fmt="%.1f")
    figure.colorbar(image, ax=left, label="strength λ")
    left.set(title="λ over progress and timestep", xlabel="progress (step / steps)", ylabel="timestep t (share masked)")
    right.plot(progress, strength.mean(0), color=MUTED, linewidth=5, alpha=0.35, label="from the flags, mean over t")
    for training in trainings:
        curve = training.curve("tidal/strength")
        # A line is the mean over the steps since the one before: it belongs to their middle.
        middle = (curve.index + np.array([0, *curve.index[:-1]])[: len(curve)]) / 2
        label = f"{training.label}, logged"
        right.plot(middle / training.last_step, curve, linewidth=1.3, label=label, **looks[training.label])
    right.set(title="mean λ: from the flags, and logged", xlabel="progress (step / steps)", ylabel="λ", xlim=(0, 1))
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return figure


@styled
def chunk_probabilities(training: TrainingRun) -> Figure:
    """Where the teacher's chunk probabilities lie and how they move; what the student gives the same chunks."""
    shares, student = training.by_bin("chunk/teacher_probability"), training.by_bin("chunk/student_probability")
    figure = new_figure(3.3)
    axes = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _shares_over_steps(axes[0], figure, training, shares)
    half = 0.5 / BINS
    axes[2].plot((0, 1), (0, 1), color=MUTED, linestyle=":", label="equal to the teacher")
    ends = (("end", at_end, "#0072B2", "s", 1.8), ("start", at_start, "#E69F00", "o", 0.7))
    for label, mean, colour, marker, height in ends:
        sizes = shares.apply(mean)
        axes[1].barh(shares.columns + half, sizes, height * half, color=colour, label=label)
        centres, means = student.columns + half, student.apply(mean)
        axes[2].plot(centres, means, color=colour, linewidth=0.8)
        marks = 8 + 120 * sizes.reindex(student.columns)
        axes[2].scatter(centres, means, marks, color=colour, marker=marker, alpha=0.8, label=label)
    axes[1].set(title="share of chunks", xlabel="share", ylim=(0, 1), yticks=np.linspace(0, 1, 6))
    axes[1].legend(fontsize=8)
    axes[2].set(title="the student's mean p", xlabel="teacher's p (larger mark: more chunks)", xlim=(0, 1), ylim=(0, 1))
    axes[2].legend(fontsize=8, loc="lower right")
    return figure


def _shares_over_steps(ax: Axes, figure: Figure, training: TrainingRun, shares: pd.DataFrame) -> None:
    table = shares.rename(columns=lambda low: round(low * BINS)).reindex(columns=range(BINS)).fillna(0).to_numpy().T
    edges = [0, *shares.index]  # a line is about the steps since the one before
    mesh = ax.pcolormesh(edges, np.linspace(0, 1, BINS + 1), table, norm=PowerNorm(0.5, 0, 1), cmap="Blues")
    figure.colorbar(mesh, ax=ax, label="share of chunks", ticks=[0, 0.05, 0.2, 0.5, 1])
    for name, label, dash in (
        ("chunk/teacher_prob", "teacher, mean", "-"),
        ("chunk/student_prob", "student, mean", "--"),
    ):
        if name in training.metrics:
            ax.plot(training.curve(name), color="#D55E00", linestyle=dash, linewidth=1.4, label=label)
    ax.axhline(0.5, color="black", linestyle=":", linewidth=1.2, label="break-even, 1/2")
    ax.set(title=training.label, xlabel="optimizer step", ylabel="p = exp(chunk log-prob / T)", ylim=(0, 1))
    ax.grid(False)
    ax.legend(fontsize=7.5, loc="upper left", framealpha=0.85, frameon=True)


@styled
def denoising_by_timestep(
    trainings: Sequence[TrainingRun], held_out: Sequence[tuple[str, pd.DataFrame]], looks: Looks
) -> Figure:
    """Denoising loss by timestep: of training runs (start and end), and of scored models (``Scores.by_timestep``)."""
    panels = bool(trainings) + bool(held_out)
    figure = new_figure(3.5, narrow=panels == 1)
    axes = figure.subplots(1, panels, squeeze=False).ravel()
    for training in trainings:
        bins = training.by_bin("denoise_by_timestep")
        centres, look = bins.columns + 0.5 / BINS, looks[training.label]
        axes[0].plot(centres, bins.apply(at_end), marker="o", markersize=3.5, linewidth=1.5, **look)
        axes[0].plot([], [], label=training.label, linewidth=1.5, **look)
        axes[0].plot(centres, bins.apply(at_start), alpha=0.35, linewidth=1, **look)
        axes[0].set(title="in training: end (strong) and start (faint)", ylabel="nats per masked token")
    for place, (label, bins) in enumerate(held_out):
        look = looks.get(label, {"color": MUTED, "linestyle": DASHES[place % len(DASHES)]})
        centres = (bins["low"] + bins["high"]) / 2
        axes[-1].plot(centres, bins[BITS], marker="o", markersize=3.5, linewidth=1.5, label=label, **look)
        low, high = (bins[f"{BITS}_{end}"] for end in ("low", "high"))
        axes[-1].fill_between(centres, low, high, color=look["color"], alpha=0.1, linewidth=0)
        axes[-1].set(title="held out (scores.json), 95 %", ylabel="bits per masked token")
    for ax in axes:
        ax.set(xlabel="timestep t (share masked)", xlim=(0, 1))
        ax.legend(fontsize=8)
    return figure


@styled
def time_and_memory(trainings: Sequence[TrainingRun]) -> Figure:
    """Teacher's and student's share of a step's time, and peak memory, of each training run."""
    figure = new_figure(0.42 * len(trainings) + 1.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1), sharey=True)
    places = np.arange(len(trainings))[::-1]
    started = np.zeros(len(trainings))
    for part, colour in (("teacher", "#0072B2"), ("student", "#E69F00")):
        widths = np.array([_end(training, f"time/{part}_share") for training in trainings])
        left.barh(places, widths, left=started, height=0.6, color=colour, label=part)
        started += widths
    for place, training in zip(places, trainings):
        if "time/step_s" in training.metrics:
            text = f" {_end(training, 'time/step_s'):.3g} s per step"
            left.text(1.0, place, text, va="center", fontsize=8, color=MUTED)
    left.set(title="share of a step's measured time", xlim=(0, 1.32), xticks=np.linspace(0, 1, 6))
    left.set_yticks(places, [training.label for training in trainings])
    kinds = [
        ("memory/host_peak_bytes", "#009E73", "of the process"),
        ("memory/device_peak_bytes", "#CC79A7", "on the GPU"),
    ]
    kinds = [kind for kind in kinds if any(kind[0] in training.metrics for training in trainings)]
    for number, (name, colour, label) in enumerate(kinds):
        peaks = [_end(training, name) / 2**30 for training in trainings]
        height = 0.6 / len(kinds)
        right.barh(places + 0.3 - (number + 0.5) * height, peaks, height=0.9 * height, color=colour, label=label)
    right.set(title="peak memory, rank 0", xlabel="GiB")
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
    _legend_below(figure, [left, right])
    return figure


@styled
def stages(table: pd.DataFrame) -> Figure:
    """Time and largest process of each stage of a recipe (``run_folder.read_stages``)."""
    figure = new_figure(0.24 * len(table) + 1.0)
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(table))[::-1]
    left.barh(places, table["seconds"] / 60, height=0.7, color="#0072B2")
    right.barh(places, table["peak_process_bytes"] / 2**30, height=0.7, color="#009E73")
    left.set_yticks(places, table["name"])
    left.set(title="time per stage", xlabel="minutes", ylim=(-0.7, len(table) - 0.3))
    right.set(title="largest process per stage", xlabel="GiB")
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
    return figure


@styled
def scores(models: pd.DataFrame) -> Figure:
    """Bits per byte with intervals, and the paired difference to the first baseline (rows of ``Scores.models``)."""
    figure = new_figure(0.36 * len(models) + 1.1)
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(models))[::-1]
    colours = np.where(models["side"] == "student", "#0072B2", "#D55E00")
    for ax, name in ((left, "bits_per_byte"), (right, "minus")):
        ax.hlines(places, models[f"{name}.low"], models[f"{name}.high"], colors=colours, linewidth=2)
        ax.scatter(models[f"{name}.value"], places, 36, color=colours)
    right.axvline(0, color=MUTED, linewidth=1)
    left.set_yticks(places, models["name"])
    left.set(title="held-out bits per byte, 95 %", xlabel="bits per byte (lower is better)")
    left.set_ylim(-0.6, len(models) - 0.4)
    right.set(title="minus the first baseline, paired, 95 %", xlabel="difference in bits per byte")
    return figure


@styled
def quality_against_speed(points: Sequence[Point]) -> Figure:
    """Score over tokens per pass, a panel per benchmark and a line per model."""
    by_curve = curves(points)
    names = list(dict.fromkeys(benchmark for benchmark, _ in by_curve))
    look = looks(list(dict.fromkeys(model for _, model in by_curve)))
    figure, axes = _panels(len(names), 3, 3.0)
    for (benchmark, model), curve in by_curve.items():
        table = {
            name: np.array([list(getattr(one, name).to_dict().values()) for one in curve]).T
            for name in ("tokens_per_pass", "score")
        }
        bars = {
            key: np.abs(table[name][1:] - table[name][0])
            for key, name in (("xerr", "tokens_per_pass"), ("yerr", "score"))
        }
        ax, style = axes[names.index(benchmark)], {"marker": "o", "markersize": 4, "elinewidth": 0.8, "linewidth": 1.5}
        ax.errorbar(table["tokens_per_pass"][0], table["score"][0], label=model, **bars, **style, **look[model])
        for point in curve if len(curve) > 1 else ():
            place = (point.tokens_per_pass.value, point.score.value)
            ax.annotate(f"{point.threshold:g}", place, (4, 4), textcoords="offset points", fontsize=7, color=MUTED)
        ax.set(title=f"{benchmark}: {curve[0].metric}", xlabel="tokens per forward pass", ylabel="score, %")
    _legend_below(figure, axes)
    return figure


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels, in rows of at most ``columns`` that are ``height`` inches high."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(height * rows + 0.35, narrow=columns == 1)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _shown(training: TrainingRun, name: str) -> bool:
    return name in training.metrics and (training.has_teacher or name not in TEACHER_LOSSES)


def _end(training: TrainingRun, name: str) -> float:
    return at_end(training.curve(name)) if name in training.metrics else 0.0


def _line(ax: Axes, curve: pd.Series, label: str, look: Mapping[str, Any]) -> None:
    """The raw curve; from ``SMOOTHED`` points on faint, with a running mean over a tenth of it on top."""
    count = len(curve)
    if count < SMOOTHED:
        ax.plot(curve, label=label, marker="." if count < 12 else None, linewidth=1.4, **look)
        return
    ax.plot(curve, alpha=0.25, linewidth=0.8, **look)
    ax.plot(curve.rolling(count // 10).mean().dropna(), label=label, linewidth=1.5, **look)


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(4, len(found)), fontsize=8.5)
