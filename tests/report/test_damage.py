"""Damaged files under a run never stop the rest: a property test that mutates a valid folder, with a fixed seed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import shutil

import pytest

from megatron_tide.report import page
from megatron_tide.report.page import build_page
from megatron_tide.report.run_folder import INFERENCE, read_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a recipe's folder is made first

FILES = [
    "scores.json",
    "completions.jsonl",
    INFERENCE,
    "bridged/metrics.jsonl",
    "bridged/run.json",
    ".stages/bridge.json",
]
ROUNDS = 50
VALUES = [
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a" * 5000,
    "\ud800",
    "\x1b]0;x\x07<b>",
    [],
    {},
]
VALUES += [[[]], {"a": {}}, ["x", 1], {"\ud800": 1}]


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value, rng):
    """``value`` with one to three places replaced, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(value)))
        if not path:
            return rng.choice(VALUES)
        *above, key = path
        parent = value
        for step in above:
            parent = parent[step]
        action = rng.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def damage(path, rng):
    """Change a JSON value inside the file, or its bytes, or what kind of file it is."""
    raw, kind = path.read_bytes(), rng.randrange(10)
    if kind == 0:
        start = rng.randrange(len(raw))
        path.write_bytes(raw[:start] + rng.randbytes(rng.randrange(40)) + raw[start + rng.randrange(400) :])
    elif kind == 1:
        path.write_bytes(rng.choice([b"", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 3000, b"null", b"1" * 10_000]))
    elif kind == 2:
        path.unlink()
        rng.choice([path.mkdir, lambda: path.symlink_to(path), lambda: os.mkfifo(path), lambda: None])()
    elif path.suffix == ".jsonl":
        lines = raw.decode().splitlines()
        for _ in range(3):
            place = rng.randrange(len(lines))
            lines[place] = (
                json.dumps(changed(json.loads(lines[place]), rng)) if lines[place][0] == "{" else lines[place]
            )
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(changed(json.loads(raw), rng)))


def test_damaged_files_never_stop_the_rest(recipe, tmp_path, monkeypatch):
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
        damaged = rng.sample(FILES, rng.choice([1, 1, 2, 3]))
        for name in damaged:
            damage(folder / name, rng)
        html = build_page(read_runs([folder]))
        assert re.findall(r'<section id="(\w+)">', html) == whole, damaged
        html.encode()
        assert "<b>" not in html
        assert "\x1b" not in html
        assert 'figure id="figure-loss-1"' in html  # of the run that is whole, at least
        if "scores.json" not in damaged:
            assert 'figure id="figure-scores"' in html
        shutil.rmtree(folder)


def test_a_damaged_run_stands_beside_a_whole_one(recipe, own_copy):
    for name in FILES:
        (own_copy / name).write_bytes(b'{"models": {"a": []}, "step": {}}')
    html = build_page(read_runs([recipe, own_copy.rename(own_copy.with_name("other"))]))
    for figure in ("scores", "tidal-1", "chunks-tiny/bridged", "stages-tiny", "alignment-tiny"):
        assert f'figure id="figure-{figure}"' in html
    damaged = ("scores.json: not", f"{INFERENCE}: not", ".stages/bridge.json: not", "bridged/metrics.jsonl: holds no")
    for words in damaged:
        assert f'<p class="note">other: {words}' in html
