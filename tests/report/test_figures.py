"""The figures show the numbers they are drawn from."""

from __future__ import annotations

import io
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from megatron_tide.objectives import tidal_strength
from megatron_tide.report import figures
from megatron_tide.report.run_folder import TrainingRun, at_end, at_start, read_run
from megatron_tide.report.style import COLOURS, DPI, looks, png

pytestmark = pytest.mark.slow  # a recipe's folder is made first: two training runs, scores, an inference benchmark

LABELS = ["baseline", "bridged"]


@pytest.fixture(scope="module")
def trainings(recipe):
    return read_run(recipe, "tiny").trainings


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}


def test_loss_parts(trainings):
    shown = panels(figures.losses(trainings, looks(LABELS)))
    assert set(shown) == {
        "total loss",
        "denoising",
        "distillation",
        "chunk objective, unweighted",
        "distribution objective, unweighted",
        "held out",
    }
    both = shown["denoising"].get_lines()
    assert [line.get_label() for line in both] == LABELS
    assert both[1].get_ydata().tolist() == trainings[1].curve("loss/denoise").tolist()
    assert [line.get_label() for line in shown["distillation"].get_lines()] == ["bridged"]
    assert shown["total loss"].get_ylabel() == "nats per maskable token"


def test_a_long_curve_is_smoothed_over_the_raw_one(tmp_path):
    values = [float(number % 2) for number in range(100)]
    run = TrainingRun(folder=tmp_path, label="long", metrics=pd.DataFrame({"loss/denoise": values}, range(1, 101)))
    raw, mean = panels(figures.losses([run], looks(["long"])))["denoising"].get_lines()
    assert raw.get_ydata().tolist() == values
    assert mean.get_ydata() == pytest.approx(np.full(91, 0.5))
    assert mean.get_xdata()[-1] == 100


def test_the_strength_map_is_that_of_the_settings(trainings):
    figure = figures.tidal(trainings[1:], looks(LABELS))
    left, right = panels(figure)["λ over progress and timestep"], panels(figure)["mean λ: from the flags, and logged"]
    shown = np.asarray(left.get_images()[0].get_array())
    t = torch.linspace(1e-3, 1, len(shown))
    for column in (0, 50, len(shown) - 1):
        expected = tidal_strength(column / (len(shown) - 1), t, ramp="linear")
        assert shown[:, column] == pytest.approx(expected.numpy())
    logged = right.get_lines()[-1]
    assert logged.get_ydata().tolist() == trainings[1].curve("tidal/strength").tolist()
    assert logged.get_xdata().tolist() == [(step - 0.5) / 8 for step in range(1, 9)]


def test_chunk_probabilities_move(trainings):
    figure = figures.chunk_probabilities(trainings[1])
    heat = np.asarray(panels(figure)["bridged"].collections[0].get_array())
    shares = trainings[1].by_bin("chunk/teacher_probability")
    assert heat.shape == (10, 8)
    assert heat.sum(0) == pytest.approx(np.ones(8))
    assert heat[3].tolist() == shares[0.3].tolist()
    bars = panels(figure)["share of chunks"].containers
    assert [bar.get_width() for bar in bars[0]] == shares.apply(at_end).tolist()
    assert [bar.get_width() for bar in bars[1]] == shares.apply(at_start).tolist()


def test_denoising_by_timestep(trainings, recipe):
    scores = read_run(recipe, "tiny").scores
    scored = list(zip(scores.models["name"], scores.by_timestep))
    both = figures.denoising_by_timestep(trainings, scored, looks(LABELS))
    training, held_out = both.axes
    bins = trainings[0].by_bin("denoise_by_timestep")
    line = training.get_lines()[0]
    assert line.get_ydata().tolist() == bins.apply(at_end).tolist()
    assert line.get_xdata() == pytest.approx([low + 0.05 for low in bins])
    assert [one.get_label() for one in held_out.get_lines()] == ["start", *LABELS, "teacher"]
    assert held_out.get_lines()[1].get_color() == line.get_color()
    band = held_out.collections[0].get_paths()[0].get_extents()
    rows = json.loads((recipe / "scores.json").read_text())["models"][0]["by_timestep"]
    assert band.y0 == min(row["bits_per_masked_token_low"] for row in rows)
    assert band.y1 == max(row["bits_per_masked_token_high"] for row in rows)
    assert len(figures.denoising_by_timestep([], scored, {}).axes) == 1


def test_time_and_memory_with_a_gpu_too(trainings, tmp_path):
    logged = {"time/teacher_share": 0.75, "time/student_share": 0.25, "memory/device_peak_bytes": 3.0 * 2**30}
    run = TrainingRun(folder=tmp_path, label="gpu", metrics=pd.DataFrame(logged, index=[1]))
    figure = figures.time_and_memory([*trainings, run])
    shares, memory = figure.axes
    teacher, student = shares.containers
    assert teacher[2].get_width() == 0.75
    assert (student[2].get_x(), student[2].get_width()) == pytest.approx((0.75, 0.25))
    process, gpu = memory.containers
    assert [bar.get_width() for bar in gpu] == [0, 0, 3]
    assert process[0].get_width() == pytest.approx(trainings[0].curve("memory/host_peak_bytes").iloc[-1] / 2**30)


def test_scores_have_their_intervals(recipe):
    models = read_run(recipe, "tiny").scores.models
    left, right = figures.scores(models).axes
    for ax, name in ((left, "bits_per_byte"), (right, "minus")):
        intervals, points = ax.collections
        assert [segment[:, 0].tolist() for segment in intervals.get_segments()] == models[
            [f"{name}.low", f"{name}.high"]
        ].to_numpy().tolist()
        assert points.get_offsets()[:, 0].tolist() == models[f"{name}.value"].tolist()
    assert [label.get_text() for label in left.get_yticklabels()] == ["start", *LABELS, "teacher"]
    assert len(right.get_lines()) == 1


def test_pictures_are_pngs_whatever_the_users_settings(trainings):
    with matplotlib.rc_context({"figure.facecolor": "black", "savefig.dpi": 20, "text.usetex": True}):
        content = png(figures.losses(trainings, looks(LABELS)))
        assert matplotlib.rcParams["text.usetex"] is True
    image = Image.open(io.BytesIO(content))
    assert image.size[0] == 10 * DPI
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_more_runs_than_colours_differ_in_their_dashes():
    chosen = looks([str(number) for number in range(2 * len(COLOURS))])
    assert len({tuple(look.values()) for look in chosen.values()}) == 2 * len(COLOURS)
