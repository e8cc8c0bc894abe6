"""Quality against speed: passes of an answer, presets at thresholds, the table, the picture, and the area."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.evaluate.benchmark_presets import PAPER
from megatron_tide.evaluate.parallelism import accuracy_under_parallelism, at_thresholds, parallelism_table, points
from megatron_tide.generate import complete
from megatron_tide.models import load_model
from megatron_tide.report.figures import quality_against_speed
from megatron_tide.report.page import build_page
from megatron_tide.report.run_folder import read_runs
from tests.support.answering import write_autoregressive
from tests.support.commands import command
from tests.support.lab import Lab

PROMPTS = ["Print line 3.", "x", "Write a function that returns the largest number.", "for name in names:"]


def test_the_passes_of_an_answer_do_not_depend_on_its_batch(lab: Lab) -> None:
    """They are those of the answer alone, and as many as its tokens where each decides one."""
    model, tokenizer = load_model(lab.student), load_tokenizer(lab.student)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for threshold in (None, 0.02, 0.0):
        rule: dict[str, Any] = {"max_new_tokens": 20, "threshold": threshold, "block_layout": "answer"}
        together = complete(model, tokenizer, ids, **rule)
        alone = [complete(model, tokenizer, [one], **rule)[0] for one in ids]
        assert [one.own_passes for one in together] == [one.passes for one in alone]
        assert [one.ids for one in together] == [one.ids for one in alone]
        blocks = [-(-len(one.ids) // model.config.block_size) for one in together]
        least = blocks if threshold == 0.0 else [len(one.ids) for one in together]
        assert threshold == 0.02 or all(one.own_passes >= few for one, few in zip(together, least))
        assert threshold != 0.0 or [one.own_passes for one in together] == blocks


def test_a_preset_at_each_threshold() -> None:
    preset = PAPER["gsm8k"]
    assert at_thresholds(preset, (), "block diffusion") == [preset]
    assert at_thresholds(preset, (0.6, 1.0, 0.6), "block diffusion") == [replace(preset, threshold=0.6), preset]
    assert at_thresholds(preset, (0.6, 1.0), "autoregressive") == [preset]


def test_the_area_is_that_of_the_paper() -> None:
    """Against the sum written out, for a curve with a point that is too bad to count."""
    tokens, scores, best = [1.0, 2.0, 3.5, 6.0], [60.0, 62.0, 58.0, 40.0], 64.0
    w = [y * min(math.exp(-3 * (1 - y / best)), 1) for y in scores]
    expected = 60.0 + 1.0 * (w[0] + w[1]) / 2 + 1.5 * (w[1] + w[2]) / 2
    assert accuracy_under_parallelism(tokens, scores, best) == pytest.approx(expected)
    assert accuracy_under_parallelism([1.0, 4.0], [50.0, 50.0], 50.0) == pytest.approx(200.0)
    assert accuracy_under_parallelism([1.0, 4.0], [0.0, 0.0], 0.0) == 0.0


def entry(model: str, threshold: float | None, tokens: float, score: float) -> dict[str, Any]:
    of = {"metric": "other", "filter": "x", "n": 9, "value": 0.0, "low": 0.0, "high": 0.0, "published": None}
    headline = {**of, "metric": "pass@1", "filter": "none", "value": score, "low": score / 2, "high": 1.0}
    preset = {"threshold": threshold, "headline": ["pass@1", "none"]}
    rate = {"value": tokens, "low": tokens, "high": tokens + 1}
    return {"model": model, "benchmark": "code", "preset": preset, "tokens_per_pass": rate, "scores": [of, headline]}


def test_table_and_picture_show_the_points(tmp_path: Path) -> None:
    benchmarks = [entry("a", 0.5, 4.0, 0.2), entry("a", None, 1.0, 0.24), entry("ar", None, 1.0, 0.3)]
    lone = {**entry("a", None, 1.0, 0.1), "benchmark": "lone"}  # no threshold: no curve
    found = points([*benchmarks, lone])
    assert [(one.model, one.threshold, one.score.value) for one in found] == [
        ("a", 0.5, 20),
        ("a", 1, 24),
        ("ar", 1, 30),
    ]
    rows = parallelism_table(found)[1]
    assert [row[:4] for row in rows] == [
        ["a", "code", "pass@1", "1"],
        ["a", "code", "pass@1", "0.5"],
        ["ar", "code", "pass@1", "1"],
    ]
    assert [row[-1] for row in rows] == [f"{accuracy_under_parallelism([1, 4], [24, 20], 30):.1f}", "", ""]
    assert rows[1][4:6] == ["4.00 [4.00, 5.00]", "20.00 [10.00, 100.00]"]
    (axes,) = quality_against_speed(found).axes
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [[1, 24], [4, 20]] in lines
    assert [text.get_text() for text in axes.texts] == ["1", "0.5"]
    (tmp_path / "scores.json").write_text(json.dumps({"benchmarks": [*benchmarks, lone]}))
    page = build_page(read_runs([tmp_path]))
    assert '<figure id="figure-parallelism"' in page
    assert "<td>4.00 [4.00, 5.00]</td>" in page
    assert "code at threshold 0.5" in page


def test_one_command_measures_it_and_goes_on_from_what_is_there(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published setting's answers are those of an evaluation without thresholds."""
    from megatron_tide.evaluate.generators import BlockDiffusionGenerator

    baseline = write_autoregressive(tmp_path / "ar", lab.student)
    asked: list[float | None] = []
    plain = BlockDiffusionGenerator._complete

    def counted(self: Any, model: Any, prompts: Any, requests: Any) -> Any:
        asked.extend(request.args[1].get("threshold") for request in requests)
        return plain(self, model, prompts, requests)

    monkeypatch.setattr(BlockDiffusionGenerator, "_complete", counted)
    scores = tmp_path / "scores.json"
    flags = [f"s={lab.student}", f"ar={baseline}", "--tasks", "humaneval", "--limit", "2", "--max-new-tokens", "8"]
    flags += ["--out", str(tmp_path / "out"), "--json", str(scores)]
    command("evaluate")(flags)
    (one, _) = json.loads(scores.read_text())["benchmarks"]
    command("evaluate")([*flags, "--thresholds", "0.03", "0", "1"])
    assert asked == [None, None, 0.03, 0.03, 0.0, 0.0]
    curve = json.loads(scores.read_text())["benchmarks"]
    assert [row["preset"]["threshold"] for row in curve] == [0.03, 0.0, None, None]
    assert {**curve[2], "seconds": 0} == {**one, "seconds": 0}
    rates = [row["tokens_per_pass"]["value"] for row in curve]
    assert rates[1] > rates[0] >= rates[2] == rates[3] == 1.0
    assert len(list((tmp_path / "out" / "s").glob("humaneval_instruct_sandboxed-*.jsonl"))) == 3
    table = capsys.readouterr().out
    assert "AUP" in table
    assert "not the paper's settings: new_tokens 8, steps 8, threshold 0.03" in table
    command("evaluate")([*flags, "--thresholds", "0.03", "0", "1"])
    assert len(asked) == 6  # nothing is generated twice
    with pytest.raises(ValueError, match="--thresholds applies to benchmarks"):
        command("evaluate")([str(lab.student), "--data", str(lab.data), "--thresholds", "0.9"])
    with pytest.raises(ValueError, match="--thresholds applies to models that decode in blocks"):
        command("evaluate")([*flags[1:], "--thresholds", "0.9"])
    assert torch.is_grad_enabled()
