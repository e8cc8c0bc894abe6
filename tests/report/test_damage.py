"""Damaged files under a run never stop the rest: a property test that mutates a valid folder, with a fixed seed."""

from __future__ import annotations

import pickle
import random
import re
import shutil

import pytest

from megatron_tide.report import page
from megatron_tide.report.page import build_page
from megatron_tide.report.run_folder import INFERENCE, read_runs
from tests.support.damage import damage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a recipe's folder is made first

FILES = [
    "scores.json",
    "completions.jsonl",
    INFERENCE,
    "bridged/metrics.jsonl",
    "bridged/run.json",
    ".stages/bridge.json",
]
ROUNDS = 40


def test_corrupt_files_never_stop_the_rest(recipe, tmp_path, monkeypatch):
    real, drawn = page.draw, {}

    def remembered(function, arguments):  # each figure of undamaged data is drawn once
        key = pickle.dumps((function.__name__, arguments))
        if key not in drawn:
            drawn[key] = real(function, arguments)
        return drawn[key]

    monkeypatch.setattr(page, "draw", remembered)
    monkeypatch.setattr(page, "aligned_samples", lambda training, folder: [])
    rng = random.Random(20261126)
    whole = re.findall(r'<section id="(\w+)">', build_page(read_runs([recipe])))
    for _ in range(ROUNDS):
        folder = shutil.copytree(recipe, tmp_path / "tiny")
        corrupt = rng.sample(FILES, rng.choice([1, 1, 2, 3]))
        for name in corrupt:
            damage(folder / name, rng)
        html = build_page(read_runs([folder]))
        assert re.findall(r'<section id="(\w+)">', html) == whole, corrupt
        html.encode()
        assert "<b>" not in html
        assert "\x1b" not in html
        assert 'figure id="figure-loss-1"' in html  # of the run that is whole, at least
        if "scores.json" not in corrupt:
            assert 'figure id="figure-scores"' in html
        shutil.rmtree(folder)


def test_a_corrupt_run_stands_beside_a_whole_one(recipe, own_copy):
    for name in FILES:
        (own_copy / name).write_bytes(b'{"models": {"a": []}, "step": {}}')
    html = build_page(read_runs([recipe, own_copy.rename(own_copy.with_name("other"))]))
    for figure in ("scores", "tidal-1", "chunks-tiny/bridged", "stages-tiny", "alignment-tiny"):
        assert f'figure id="figure-{figure}"' in html
    corrupt = ("scores.json: not", f"{INFERENCE}: not", ".stages/bridge.json: not", "bridged/metrics.jsonl: holds no")
    for words in corrupt:
        assert f'<p class="note">other: {words}' in html
