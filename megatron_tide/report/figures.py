"""The figures of curves and scores: each function draws one from typed data (``reading``) and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from megatron_tide.objectives import tidal_strength
from megatron_tide.objectives.common import BINS
from megatron_tide.report.reading import Curve, Score, Stage, Training
from megatron_tide.report.style import DASHES, MUTED, drawn, new_figure

Looks = Mapping[str, Mapping[str, Any]]
LOSSES = {  # name in the logs -> (title, unit)
    "loss/total": ("total loss", "nats a maskable token"),
    "loss/denoise": ("denoising", "nats a maskable token"),
    "loss/distill": ("distillation", "nats a chunk, weighted"),
    "distill/chunk": ("chunk objective, unweighted", "nats a chunk"),
    "distill/kl": ("distribution objective, unweighted", "nats a pair, times T²"),
    "validation/bits_per_byte": ("held out", "bits per byte"),
}
OF_A_TEACHER = ("loss/total", "loss/distill")  # without one, the same as denoising, and zeros
SMOOTHED = 30  # log lines from which on a running mean is drawn over the raw curve
GRID = 200  # points a side of the TIDAL map


def has_losses(trainings: Sequence[Training]) -> bool:
    return any(_shown(training, name) for training in trainings for name in LOSSES)


@drawn
def losses(trainings: Sequence[Training], looks: Looks) -> Figure:
    """Loss parts over steps, a panel each; a part that no training logged has none."""
    parts = [name for name in LOSSES if any(_shown(training, name) for training in trainings)]
    columns = 2 if len(parts) in (2, 4) else min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = new_figure(2.6 * rows + 0.35, narrow=columns == 1)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, name in zip(axes, parts):
        for training in trainings:
            if _shown(training, name):
                _line(ax, training.curves[name], training.label, looks[training.label])
        title, unit = LOSSES[name]
        ax.set(title=title, xlabel="optimizer step", ylabel=unit)
    for ax in axes[len(parts) :]:
        ax.set_visible(False)
    _legend_below(figure, list(axes[: len(parts)]))
    return figure


@drawn
def tidal(trainings: Sequence[Training], looks: Looks) -> Figure:
    """The strength over (progress, timestep) as the knobs of ``trainings`` say (equal ones), and what was logged."""
    knobs = trainings[0].strategy
    chosen = {name: knobs[f"tidal_{name}"] for name in ("init", "peak", "ramp", "axes")}
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
    right.plot(progress, strength.mean(0), color=MUTED, linewidth=5, alpha=0.35, label="these knobs, mean over t")
    for training in trainings:
        curve = training.curves.get("tidal/strength")
        if curve:
            # A line is the mean over the steps since the one before: it belongs to their middle.
            at = (np.array(curve.steps) + np.array([0, *curve.steps[:-1]])) / 2 / training.total_steps
            right.plot(at, curve.values, linewidth=1.3, label=f"{training.label}, logged", **looks[training.label])
    right.set(title="mean λ: foretold and logged", xlabel="progress (step / steps)", ylabel="λ", xlim=(0, 1))
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    return figure


@drawn
def chunk_probabilities(training: Training) -> Figure:
    """Where the teacher's chunk probabilities lie and how they move; what the student gives the same chunks."""
    shares, student = training.by_bin("chunk/teacher_probability"), training.by_bin("chunk/student_probability")
    figure = new_figure(3.3)
    axes = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _moving_shares(axes[0], figure, training, shares)
    heights = {word: np.array([getattr(shares[low], word)() for low in shares]) for word in ("first", "last")}
    places, width = np.array(list(shares)), 1 / BINS
    axes[1].barh(places + 0.5 * width, heights["last"], 0.9 * width, color="#0072B2", label="end")
    axes[1].barh(places + 0.5 * width, heights["first"], 0.35 * width, color="#E69F00", label="start")
    axes[1].set(title="share of chunks", xlabel="share", ylim=(0, 1), yticks=np.linspace(0, 1, 6))
    axes[1].legend(fontsize=8)
    axes[2].plot((0, 1), (0, 1), color=MUTED, linestyle=":", label="equal to the teacher")
    for word, colour, marker in (("first", "#E69F00", "o"), ("last", "#0072B2", "s")):
        label = {"first": "start", "last": "end"}[word]
        centres = np.array(list(student)) + 0.5 * width
        means = [getattr(curve, word)() for curve in student.values()]
        sizes = [8 + 120 * getattr(shares[low], word)() for low in student]
        axes[2].plot(centres, means, color=colour, linewidth=0.8)
        axes[2].scatter(centres, means, sizes, color=colour, marker=marker, alpha=0.8, label=label)
    axes[2].set(title="the student's mean p", xlabel="teacher's p (marks: how many)", xlim=(0, 1), ylim=(0, 1))
    axes[2].legend(fontsize=8, loc="lower right")
    return figure


def _moving_shares(ax: Axes, figure: Figure, training: Training, shares: Mapping[float, Curve]) -> None:
    steps = sorted({step for curve in shares.values() for step in curve.steps})
    table, column = np.zeros((BINS, len(steps))), {step: place for place, step in enumerate(steps)}
    for low, curve in shares.items():
        table[round(low * BINS), [column[step] for step in curve.steps]] = curve.values
    edges = [0, *steps]  # a line tells of the steps since the one before
    mesh = ax.pcolormesh(edges, np.linspace(0, 1, BINS + 1), table, norm=PowerNorm(0.5, 0, 1), cmap="Blues")
    figure.colorbar(mesh, ax=ax, label="share of chunks", ticks=[0, 0.05, 0.2, 0.5, 1])
    for name, label, dash in (
        ("chunk/teacher_prob", "teacher, mean", "-"),
        ("chunk/student_prob", "student, mean", "--"),
    ):
        if name in training.curves:
            curve = training.curves[name]
            ax.plot(curve.steps, curve.values, color="#D55E00", linestyle=dash, linewidth=1.4, label=label)
    ax.axhline(0.5, color="black", linestyle=":", linewidth=1.2, label="break-even, 1/2")
    ax.set(title=training.label, xlabel="optimizer step", ylabel="p = exp(chunk log-prob / T)", ylim=(0, 1))
    ax.grid(False)
    ax.legend(fontsize=7.5, loc="upper left", framealpha=0.85, frameon=True)


@drawn
def denoising_by_timestep(trainings: Sequence[Training], scores: Sequence[tuple[str, Score]], looks: Looks) -> Figure:
    """Denoising loss by timestep: of training runs (start and end), and held out where there are ``scores``."""
    panels = bool(trainings) + bool(scores)
    figure = new_figure(3.5, narrow=panels == 1)
    axes = figure.subplots(1, panels, squeeze=False).ravel()
    if trainings:
        for training in trainings:
            bins = training.by_bin("denoise_by_timestep")
            centres = [low + 0.5 / BINS for low in bins]
            look = {**looks[training.label], "linewidth": 1.5}
            axes[0].plot(centres, [curve.last() for curve in bins.values()], marker="o", markersize=3.5, **look)
            axes[0].plot([], [], label=training.label, **look)
            axes[0].plot(centres, [c.first() for c in bins.values()], **{**look, "alpha": 0.35, "linewidth": 1})
        axes[0].set(title="in training: end (strong) and start (faint)", ylabel="nats a masked token")
        axes[0].legend(fontsize=8)
    if scores:
        for place, (label, score) in enumerate(scores):
            centres = [(row["low"] + row["high"]) / 2 for row in score.by_timestep]
            heights = [row["bits"] for row in score.by_timestep]
            other = {"color": MUTED, "linestyle": DASHES[place % len(DASHES)]}
            held_out = looks.get(label, other)
            axes[-1].plot(centres, heights, marker="o", markersize=3.5, linewidth=1.5, label=label, **held_out)
            low, high = ([row[f"bits_{end}"] for row in score.by_timestep] for end in ("low", "high"))
            axes[-1].fill_between(centres, low, high, color=held_out["color"], alpha=0.1, linewidth=0)
        axes[-1].set(title="held out (scores.json), 95 %", ylabel="bits a masked token")
        axes[-1].legend(fontsize=8)
    for ax in axes:
        ax.set(xlabel="timestep t (share masked)", xlim=(0, 1))
    return figure


@drawn
def time_and_memory(trainings: Sequence[Training]) -> Figure:
    """Share of the timed parts of a step, and peak memory, of each training."""
    figure = new_figure(0.42 * len(trainings) + 1.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1), sharey=True)
    places = np.arange(len(trainings))[::-1]
    started = np.zeros(len(trainings))
    for part, colour in (("teacher", "#0072B2"), ("student", "#E69F00")):
        widths = np.array([_last(training, f"time/{part}_share") for training in trainings])
        left.barh(places, widths, left=started, height=0.6, color=colour, label=part)
        started += widths
    for place, training in zip(places, trainings):
        if "time/step_s" in training.curves:
            text = f" {_last(training, 'time/step_s'):.3g} s a step"
            left.text(1.0, place, text, va="center", fontsize=8, color=MUTED)
    left.set(title="share of the timed parts of a step", xlim=(0, 1.32), xticks=np.linspace(0, 1, 6))
    left.set_yticks(places, [training.label for training in trainings])
    kinds = [
        ("memory/host_peak_bytes", "#009E73", "of the process"),
        ("memory/device_peak_bytes", "#CC79A7", "on the GPU"),
    ]
    kinds = [kind for kind in kinds if any(kind[0] in training.curves for training in trainings)]
    for number, (name, colour, label) in enumerate(kinds):
        peaks = [_last(training, name) / 2**30 for training in trainings]
        height = 0.6 / len(kinds)
        right.barh(places + 0.3 - (number + 0.5) * height, peaks, height=0.9 * height, color=colour, label=label)
    right.set(title="peak memory, rank 0", xlabel="GiB")
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
    _legend_below(figure, [left, right])
    return figure


@drawn
def stages(named: Sequence[Stage]) -> Figure:
    """Where the recipe's time went, stage by stage, and the largest process of each."""
    figure = new_figure(0.24 * len(named) + 1.0)
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(named))[::-1]
    left.barh(places, [stage.seconds / 60 for stage in named], height=0.7, color="#0072B2")
    right.barh(places, [stage.peak_bytes / 2**30 for stage in named], height=0.7, color="#009E73")
    left.set_yticks(places, [stage.name for stage in named])
    left.set(title="minutes of each stage", xlabel="minutes", ylim=(-0.7, len(named) - 0.3))
    right.set(title="its largest process", xlabel="GiB")
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
    return figure


@drawn
def scores(rows: Sequence[tuple[str, Score]]) -> Figure:
    """Bits per byte with intervals, and the paired difference to the first student, a row a model."""
    figure = new_figure(0.36 * len(rows) + 1.1)
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    for place, (_, score) in zip(places, rows):
        colour = {"student": "#0072B2"}.get(score.side, "#D55E00")
        for ax, estimate in ((left, score.bits), (right, score.less)):
            if estimate is not None:
                ax.plot((estimate.low, estimate.high), (place, place), color=colour, linewidth=2)
                ax.plot(estimate.value, place, marker="o", color=colour, markersize=6)
    right.axvline(0, color=MUTED, linewidth=1)
    left.set_yticks(places, [label for label, _ in rows])
    left.set(
        title="held-out bits per byte, 95 %", xlabel="bits per byte (lower is better)", ylim=(-0.6, len(rows) - 0.4)
    )
    right.set(title="less the first student, paired, 95 %", xlabel="difference in bits per byte")
    return figure


def _shown(training: Training, name: str) -> bool:
    return name in training.curves and (training.listens or name not in OF_A_TEACHER)


def _last(training: Training, name: str) -> float:
    return training.curves[name].last() if name in training.curves else 0.0


def _line(ax: Axes, curve: Curve, label: str, look: Mapping[str, Any]) -> None:
    """The raw curve; from ``SMOOTHED`` points on faint, with a running mean of a tenth of it on top."""
    count = len(curve.values)
    if count < SMOOTHED:
        ax.plot(curve.steps, curve.values, label=label, marker="." if count < 12 else None, linewidth=1.4, **look)
        return
    ax.plot(curve.steps, curve.values, alpha=0.25, linewidth=0.8, **look)
    width = count // 10
    means = np.convolve(curve.values, np.ones(width) / width, mode="valid")
    ax.plot(curve.steps[width - 1 :], means, label=label, linewidth=1.5, **look)


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(4, len(found)), fontsize=8.5)
