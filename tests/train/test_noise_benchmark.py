"""What benchmarks/noise.py compares, on toys: its statistics, its commands, and a run that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import noise as benchmark
from megatron_tide import cli
from megatron_tide.__main__ import command, split_commands
from megatron_tide.data import PreparedData
from tests.support.lab import Lab

EXACT = "block+stratified+exact"


def test_variances_of_resampled_gradients() -> None:
    g_GP = np.random.default_rng(0).normal(1, 2, (6, 40))
    counted = [0, 0, 2, 5, 5, 3]
    times = np.stack([np.ones(6), np.bincount(counted, minlength=6)]).astype(float)
    found = benchmark.variances(g_GP @ g_GP.T, times)
    for column, rows in enumerate((g_GP, g_GP[counted])):
        assert found[0, column] == pytest.approx(rows.var(0, ddof=1).sum())
        assert found[1, column] == pytest.approx(np.linalg.norm(rows, axis=1).var(ddof=1))


def test_gradients_vary_less_with_noise_per_block(lab: Lab) -> None:
    figures = benchmark.variance_figures(lab.student, PreparedData.open(lab.student_data), samples=4, draws=8)
    assert list(figures) == list(benchmark.FORMS)
    assert figures["published"]["gradient_variance_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert figures[EXACT]["gradient_variance_ratio"]["high"] < 1
    assert figures[EXACT]["norm_variance"] >= 0


def flags(lab: Lab, folder: Path, **more: object) -> list[str]:
    given = {"student": lab.student, "data": lab.student_data, "test-data": lab.student_data, "folder": folder}
    given |= {"samples": 2, "draws": 8, "steps": 2, "seeds": 2, "json": folder / "out.json", **more}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_a_run_that_was_cut_off_goes_on(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are understood, by their own parsers; training and scores are made up."""
    ran: list[list[str]] = []

    def made_up(words: list[str], folder: Path) -> None:
        if len(ran) == 3:
            raise KeyboardInterrupt
        for called in split_commands(words):
            cli.parse(command(called[0]), called[1:])
        ran.append(words)
        (folder / "scores.json").write_text(json.dumps({"models": [{"bits_per_byte": {"value": len(ran)}}]}))

    forms = {name: benchmark.FORMS[name] for name in ("published", EXACT)}
    monkeypatch.setattr(benchmark, "FORMS", forms)
    monkeypatch.setattr(benchmark, "command", made_up)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(flags(lab, tmp_path))
    ran.append([])
    benchmark.main(flags(lab, tmp_path))
    assert len(ran) == 5, "what was measured is not measured again"
    record = json.loads((tmp_path / "out.json").read_text())
    assert [record[form]["bits_per_byte"] for form in forms] == [[1, 3], [2, 5]]
    assert record[EXACT]["minus_published"]["value"] == 1.5
    assert ["--mask-count" in words for words in ran if words] == [False, True, False, True]
    assert str(tmp_path) not in json.dumps({name: record[name] for name in (*forms, "training", "scoring")})
    with pytest.raises(ValueError, match=r"measured\.json: measured with other settings"):
        benchmark.main(flags(lab, tmp_path, steps=3))


def test_mistakes(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give all of --student, --data and --test-data, or none"):
        benchmark.main(["--student", str(lab.student)])
    with pytest.raises(ValueError, match="--draws at least 8"):
        benchmark.main(flags(lab, tmp_path, draws=7))
    with pytest.raises(ValueError, match="init-model failed: error: t: no such local tokenizer"):
        benchmark.command(
            ["init-model", "--config", "nowhere", "--tokenizer", "t", "--seed", "0", "--out", "x"], tmp_path
        )


@pytest.mark.slow
def test_a_real_run(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "FORMS", {name: benchmark.FORMS[name] for name in ("published", EXACT)})
    benchmark.main(flags(lab, tmp_path, seeds=1))
    record = json.loads((tmp_path / "out.json").read_text())
    published, exact = (record[form]["bits_per_byte"] for form in ("published", EXACT))
    assert 1 < published[0] < 20
    assert 0 < abs(exact[0] - published[0]) < 1
