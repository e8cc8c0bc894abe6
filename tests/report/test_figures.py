"""The figures show the numbers they are drawn from."""

from __future__ import annotations

import io
import json

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_tide.bridge import load_tokenizer
from megatron_tide.objectives import tidal_strength
from megatron_tide.report import figures
from megatron_tide.report.alignment import LINE_BYTES, Box, Pair, align, alignment, pairs_of
from megatron_tide.report.reading import Curve, Training, read_run
from megatron_tide.report.style import COLOURS, DPI, looks, png

pytestmark = pytest.mark.slow  # a recipe's folder is made first: two training runs, scores, a footprint

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
    assert both[1].get_ydata().tolist() == trainings[1].curves["loss/denoise"].values
    assert [line.get_label() for line in shown["distillation"].get_lines()] == ["bridged"]
    assert shown["total loss"].get_ylabel() == "nats a maskable token"


def test_a_long_curve_is_smoothed_over_the_raw_one(tmp_path):
    curve = Curve(list(range(1, 101)), [float(number % 2) for number in range(100)])
    run = Training(folder=tmp_path, label="long", curves={"loss/denoise": curve})
    raw, mean = panels(figures.losses([run], looks(["long"])))["denoising"].get_lines()
    assert raw.get_ydata().tolist() == curve.values
    assert mean.get_ydata() == pytest.approx(np.full(91, 0.5))
    assert mean.get_xdata()[-1] == 100


def test_the_strength_map_is_that_of_the_knobs(trainings):
    figure = figures.tidal(trainings[1:], looks(LABELS))
    left, right = panels(figure)["λ over progress and timestep"], panels(figure)["mean λ: foretold and logged"]
    shown = np.asarray(left.get_images()[0].get_array())
    t = torch.linspace(1e-3, 1, len(shown))
    for column in (0, 50, len(shown) - 1):
        expected = tidal_strength(column / (len(shown) - 1), t, ramp="linear")
        assert shown[:, column] == pytest.approx(expected.numpy())
    logged = right.get_lines()[-1]
    assert logged.get_ydata().tolist() == trainings[1].curves["tidal/strength"].values
    assert logged.get_xdata().tolist() == [(step - 0.5) / 8 for step in range(1, 9)]


def test_chunk_probabilities_move(trainings):
    figure = figures.chunk_probabilities(trainings[1])
    heat = np.asarray(panels(figure)["bridged"].collections[0].get_array())
    shares = trainings[1].by_bin("chunk/teacher_probability")
    assert heat.shape == (10, 8)
    assert heat.sum(0) == pytest.approx(np.ones(8))
    assert heat[3].tolist() == shares[0.3].values
    bars = panels(figure)["share of chunks"].containers
    assert [bar.get_width() for bar in bars[0]] == [curve.last() for curve in shares.values()]
    assert [bar.get_width() for bar in bars[1]] == [curve.first() for curve in shares.values()]


def test_denoising_by_timestep(trainings, recipe):
    scored = [(score.name, score) for score in read_run(recipe, "tiny").scores.models]
    both = figures.denoising_by_timestep(trainings, scored, looks(LABELS))
    training, held_out = both.axes
    bins = trainings[0].by_bin("denoise_by_timestep")
    line = training.get_lines()[0]
    assert line.get_ydata().tolist() == [curve.last() for curve in bins.values()]
    assert line.get_xdata() == pytest.approx([low + 0.05 for low in bins])
    assert [one.get_label() for one in held_out.get_lines()] == ["start", *LABELS, "teacher"]
    assert held_out.get_lines()[1].get_color() == line.get_color()
    band = held_out.collections[0].get_paths()[0].get_extents()
    rows = json.loads((recipe / "scores.json").read_text())["models"][0]["by_timestep"]
    assert band.y0 == min(row["bits_per_masked_token_low"] for row in rows)
    assert band.y1 == max(row["bits_per_masked_token_high"] for row in rows)
    assert len(figures.denoising_by_timestep([], scored, {}).axes) == 1


def test_time_and_memory_with_a_gpu_too(trainings, tmp_path):
    curves = {"time/teacher_share": 0.75, "time/student_share": 0.25, "memory/device_peak_bytes": 3 * 2**30}
    run = Training(folder=tmp_path, label="gpu", curves={name: Curve([1], [value]) for name, value in curves.items()})
    figure = figures.time_and_memory([*trainings, run])
    shares, memory = figure.axes
    teacher, student = shares.containers
    assert teacher[2].get_width() == 0.75
    assert (student[2].get_x(), student[2].get_width()) == pytest.approx((0.75, 0.25))
    process, gpu = memory.containers
    assert [bar.get_width() for bar in gpu] == [0, 0, 3]
    assert process[0].get_width() == pytest.approx(trainings[0].curves["memory/host_peak_bytes"].values[-1] / 2**30)


def test_scores_have_their_intervals(recipe):
    rows = [(score.name, score) for score in read_run(recipe, "tiny").scores.models]
    left, right = figures.scores(rows).axes
    drawn = [tuple(line.get_xdata()) for line in left.get_lines()][::2]
    assert drawn == [(score.bits.low, score.bits.high) for _, score in rows]
    assert [label.get_text() for label in left.get_yticklabels()] == ["start", *LABELS, "teacher"]
    assert len(right.get_lines()) == 2 * len(rows) + 1


def test_pieces_of_the_picture_spell_the_text(recipe, chain, trainings):
    pairs = pairs_of(trainings[1], recipe)
    assert len(pairs) >= 2
    for pair in pairs:
        for side in (pair.student, pair.teacher):
            assert [box.start for box in side[1:]] == [box.end for box in side[:-1]]
        student, teacher = ("".join(box.shown for box in side) for side in (pair.student, pair.teacher))
        assert student == teacher
        assert student.startswith("def·")
        for box in pair.student:
            if box.chunk in pair.one_to_one:
                (twin,) = [other for other in pair.teacher if other.chunk == box.chunk]
                assert (twin.start, twin.end) == (box.start, box.end)
    shown = [text.get_text() for text in alignment(pairs).axes[0].texts]
    assert shown.count("student") == shown.count("teacher") >= len(pairs)
    assert {box.shown for box in pairs[0].teacher} <= set(shown)


def test_lines_break_where_both_sides_end_a_chunk():
    long = Box(0, LINE_BYTES + 20, "x" * (LINE_BYTES + 20), 0)
    short = [Box(long.end + 6 * n, long.end + 6 * n + 6, "abc def", n + 1) for n in range(30)]
    halves = [Box(box.start + 3 * n, box.start + 3 * n + 3, "abc", box.chunk) for box in short for n in (0, 1)]
    texts = [
        text.get_text() for text in alignment([Pair([long, *short], [long, *halves], frozenset({0}))]).axes[0].texts
    ]
    assert texts.count("student") == 1 + -(-30 * 6 // (LINE_BYTES // 6 * 6))
    assert texts.count("abc def") == 30
    assert texts.count("abc") == 60


def test_a_character_without_a_glyph_or_unaligned_is_still_shown(chain):
    student, teacher = (load_tokenizer(chain.root / side) for side in ("student", "teacher"))
    (pair,) = align(student, teacher, ["a \U00012345 b"], same=False)
    assert all(box.chunk < 0 or box.end > box.start for box in pair.student)
    png(alignment([pair]))


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
