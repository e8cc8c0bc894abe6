"""Numbers of the study and of real weights in the READMEs are those of benchmarks/results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.files import read_json

REPOSITORY = Path(__file__).resolve().parents[2]
NUMBERS = re.compile(r"[-+]?\d+\.\d+|\d+e-\d+")


@pytest.fixture(scope="module")
def study() -> Any:
    return read_json(REPOSITORY / "benchmarks" / "results" / "study.json")


def rows(file: str, heading: str) -> dict[str, list[str]]:
    """The cells of a section's table, by its first cell."""
    section = (REPOSITORY / file).read_text().split(f" {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def interval(values: dict[str, float]) -> str:
    return f"{values['value']:+.4f} [{values['low']:+.4f}, {values['high']:+.4f}]"


def test_verdicts(study: Any) -> None:
    table = rows("README.md", "What five seeds say")
    assert list(table) == [one["name"] for one in study["hypotheses"]]
    for one in study["hypotheses"]:
        _, difference, p, verdict = table[one["name"]]
        assert difference == interval(one["difference"])
        assert one["p_holm"] < 1e-6 if p == "< 1e-6" else float(p) == pytest.approx(one["p_holm"], rel=0.05)
        assert verdict.strip("*") == one["verdict"]


def test_models(study: Any) -> None:
    table = rows("recipes/README.md", "The study")
    assert set(table) == set(study["models"])
    for name, (bits, change, settings) in table.items():
        assert bits == f"{study['models'][name]['bits_per_byte']:.4f}"
        assert name == "start" or change == interval(study["models"][name]["minus_start"])
        if name in study["tuning"]:
            assert float(NUMBERS.findall(settings)[0]) == study["tuning"][name]["chosen"]["lr"]


def test_on_policy() -> None:
    found = read_json(REPOSITORY / "benchmarks" / "results" / "study_on_policy.json")
    table = rows("recipes/README.md", "On the student's own text")
    assert {name.split(",")[0] for name in table} == set(found["models"])
    for name, (bits, change) in table.items():
        one = found["models"][name.split(",")[0]]
        assert bits == f"{one['bits_per_byte']:.4f}"
        assert change == ("" if name == "start" else interval(one["minus_start"]))
    (h9,) = found["hypotheses"]
    assert h9["verdict"] == "does not hold"
    assert interval(h9["difference"]) in (REPOSITORY / "README.md").read_text()


def test_own_masks() -> None:
    found = read_json(REPOSITORY / "benchmarks" / "results" / "study_own_masks.json")
    said = " ".join((REPOSITORY / "recipes" / "README.md").read_text().split())
    assert found["hypotheses"][0]["verdict"] == "not decided"
    ends = [f"`{name}` {{}} {found['models'][name]['bits_per_byte']:.4f}" for name in ("order", "random")]
    assert f"{ends[0].format('ends at')} bits per byte and {ends[1].format('at')}, a difference of" in said
    assert interval(found["hypotheses"][0]["difference"]) in said


def test_noise() -> None:
    found = read_json(REPOSITORY / "benchmarks" / "results" / "noise.json")
    table = rows("recipes/README.md", "Noise per block, measured")
    for name, (gradient, norm, bits, change) in table.items():
        one = found[name]
        assert bits == f"{sum(one['bits_per_byte']) / len(one['bits_per_byte']):.4f}"
        for cell, key in ((gradient, "gradient_variance_ratio"), (norm, "norm_variance_ratio")):
            assert cell == ("1" if name == "published" else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**one[key]))
        assert change == ("" if name == "published" else interval(one["minus_published"]))
    assert set(table) == {"published", "block", "block+stratified", "block+stratified+exact"}


def test_real_weights() -> None:
    scores = read_json(REPOSITORY / "benchmarks" / "results" / "real_small.json")["scores"]
    table = rows("recipes/README.md", "Real weights on a small machine")
    assert set(table) == set(scores)
    for name, (_, bits, completions) in table.items():
        assert bits == f"{scores[name]['bits_per_byte']['value']:.3f}"
        assert completions == "{both} of {count}".format(**scores[name]["completions"])
    effect = scores["kl"]["minus"]["bd3lm"]
    assert "{value:.3f} [{high:.3f}, {low:.3f}] bits per byte less".format(
        **{name: -value for name, value in effect.items()}
    ) in (REPOSITORY / "README.md").read_text().replace("\n", " ")


def test_settings_of_the_adaptation() -> None:
    found = read_json(REPOSITORY / "benchmarks" / "results" / "real_small_settings.json")
    phases, none, four = (f"{one['bits_per_byte']['value']:.3f}" for one in found["models"].values())
    text = " ".join((REPOSITORY / "recipes" / "README.md").read_text().split())
    told = f"phases of `ar:0.1,joint:0.3` {phases}, none {none}, none and 4 samples per step in place of 8 {four}."
    assert told in text
    assert f"`ar:0.1,joint:0.3` cost {float(phases) - float(none):.3f} bits per byte" in text
    assert f"chosen on {found['settings']['samples']} samples" in text


def test_cache() -> None:
    table = rows("recipes/README.md", "Teacher outputs computed once")
    files = (("`tide-bridge`", "cache.json"), ("`tide-cross`", "cache_tide_cross.json"))
    for (name, (size, faster, trainings)), (strategy, file) in zip(table.items(), files, strict=True):
        found = read_json(REPOSITORY / "benchmarks" / "results" / file)
        assert name.startswith(strategy)
        assert f"({'../benchmarks/results/' + file})" in name
        assert f"`{found['strategy']}`" == strategy
        assert float(size) == pytest.approx(found["bytes_per_student_token"], rel=0.01)
        assert float(faster) == pytest.approx(found["speed_up"], abs=0.005)
        assert float(trainings) == pytest.approx(found["trainings_to_pay"], abs=0.05)


def test_logs_of_the_study() -> None:
    found = read_json(REPOSITORY / "benchmarks" / "results" / "study_logs.json")
    text = " ".join((REPOSITORY / "recipes" / "README.md").read_text().split())
    (several,) = {round(100 * one["several_tokens"]) for one in found["spelled"]["seeds"].values()}
    assert f"Of its mass, {several} % lies on" in text
    rounds = found["rollouts"]["seeds"].values()
    shares = [100 * one["rollout_share"] for one in rounds]
    assert f"they took {min(shares):.0f} to {max(shares):.0f} %" in text
    for one in rounds:
        seconds = one["rollout_seconds"], one["training_seconds"]
        assert one["rollout_share"] == pytest.approx(seconds[0] / sum(seconds), abs=1e-4)
    answers, tokens = (sum(one[name] for one in rounds) for name in ("answers", "tokens"))
    assert f"200 answers of {tokens / answers:.0f} tokens" in text
