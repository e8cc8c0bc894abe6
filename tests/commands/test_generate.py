"""The generate command on a model folder and on a checkpoint."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from megatron_tide import cli
from tests.support.commands import command
from tests.support.lab import Lab, write_checkpoint

generate = command("generate")


def test_prompts_from_the_command_line(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    generate([str(lab.student), "--prompt", "Hello", "--prompt", "Bye", "--max-new-tokens", "9"])
    printed = capsys.readouterr().out
    assert "--- prompt 2 of 2\nBye\n--- answer" in printed
    assert "tokens/s" in printed.splitlines()[-1]


def test_prepared_prompts_with_a_checkpoint(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    flags = ["--data", str(lab.data), "--limit", "2", "--show-reference", "--max-new-tokens", "5"]
    generate([str(tmp_path / "run"), *flags, "--json", str(tmp_path / "answers.jsonl")])
    printed = capsys.readouterr().out
    assert "--- reference\nvalue_0 = 0" in printed
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 1 <= row["tokens"] <= 5
        assert row["reference"].startswith("value_")


def test_infilling(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    generate([str(lab.student), "--prompt", "Hello", "--infill", "a = <mask:3>\\nb = 1", "--steps", "4"])
    printed = capsys.readouterr().out
    assert "--- answer\na = " in printed
    assert "\nb = 1\n" in printed
    assert printed.splitlines()[-1].startswith("3 tokens")


def test_chat(lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    generate([str(lab.student), "--chat", "--max-new-tokens", "9", "--threshold", "0.0"])
    assert "tokens/s" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--file", "nowhere.jsonl", "--infill", "<mask:1>"], "--infill"),
        (["--prompt", "x", "--infill", "no hole"], "<mask:N>"),
        (["--prompt", "x", "--steps", "0"], "steps"),
        (["--prompt", "x", "--threshold", "7"], "threshold"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "nowhere"], "nowhere"),
        (["--prompt", "x", "--batch-size", "0"], "batch size"),
    ],
)
def test_mistakes_are_one_line(lab: Lab, capsys: pytest.CaptureFixture[str], flags: list[str], word: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate, [str(lab.student), *flags])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert word in error
    assert "\n" not in error


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate, ["./nowhere", "--prompt", "x"])
    assert ended.value.code == 2
    assert "nowhere" in capsys.readouterr().err
