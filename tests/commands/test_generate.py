"""The generate command on a model folder and on a checkpoint."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from megatron_tide import cli
from megatron_tide.screen import printable
from tests.support.answering import write_autoregressive
from tests.support.ar_models import ar_folder
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
    generate(
        [str(lab.student), "--prompt", "Hello", "--infill", "a = <mask:3>\\nb = '\\\\n'", "--tokens-per-step", "2"]
    )
    printed = capsys.readouterr().out
    assert "--- answer\na = " in printed
    assert "\nb = '\\n'\n" in printed
    assert printed.splitlines()[-1].startswith("3 tokens")


def test_chat(lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    generate([str(lab.student), "--chat", "--max-new-tokens", "9", "--threshold", "0.0"])
    assert "tokens/s" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--chat", "--infill", "<mask:1>"], "--infill"),
        (["--chat", "--json", "a.jsonl"], "--json"),
        (["--prompt", "x", "--json", "nowhere/a.jsonl"], "no such folder nowhere"),
        (["--prompt", "x", "--json", "."], "is a folder"),
        (["--prompt", "x", "--json", "/dev/null"], "--json /dev/null: cannot be written"),
        (["--prompt", "x", "--infill", "no hole"], "<mask:N>"),
        (["--prompt", "x", "--infill", ""], "<mask:N>"),
        (["--prompt", "x", "--infill", "<mask:1>", "--steps", "4"], "--steps applies to answers that are written"),
        (["--prompt", "x", "--limit", "3"], "--limit applies to --file and --data"),
        (["--chat", "--show-reference"], "--show-reference applies to --file and --data"),
        (["--data", "DATA", "--system", "x"], "--system applies to --prompt and --chat"),
        (["--prompt", "x", "--steps", "0"], "steps"),
        (["--prompt", "x", "--threshold", "7"], "threshold"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "nowhere"], "nowhere"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_mistakes_are_one_line(lab: Lab, capsys: pytest.CaptureFixture[str], flags: list[str], word: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate, [str(lab.student), *(str(lab.data) if flag == "DATA" else flag for flag in flags)])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert word in error
    assert "\n" not in error


def test_a_stopped_file_of_prompts_goes_on(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out, whole = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "whole.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": f"Say {'x' * n}."}) + "\n" for n in (9, 1, 5, 3, 7)))
    flags = [str(lab.student), "--file", str(prompts), "--max-new-tokens", "6", "--batch-size", "2"]
    flags += ["--temperature", "1"]
    generate([*flags, "--json", str(whole)])
    rows = whole.read_text().splitlines(keepends=True)
    assert [json.loads(row)["prompt"] for row in rows] == [f"Say {'x' * n}." for n in (9, 1, 5, 3, 7)]
    out.write_text(rows[2] + rows[0] + rows[4][:20])  # killed while it wrote the third answer
    capsys.readouterr()
    generate([*flags, "--json", str(out)])
    printed = capsys.readouterr().out
    assert "2 of 5 answers are there from before" in printed
    assert printed.count("--- answer") == 3
    assert out.read_text() == whole.read_text()
    with pytest.raises(ValueError, match=r"answers.jsonl:1: an answer of another model, prompt or setting"):
        generate([*flags, "--json", str(out), "--seed", "1"])
    for name, key in (("config.json", "rope_theta"), ("tokenizer_config.json", "eos_token")):
        other = shutil.copytree(lab.student, tmp_path / name)
        values = json.loads((other / name).read_text())
        changed = values[key] / 2 if key == "rope_theta" else values["pad_token"]
        (other / name).write_text(json.dumps({**values, key: changed}))
        with pytest.raises(ValueError, match=r"answers.jsonl:1: an answer of another model, prompt or setting"):
            generate([str(other), *flags[1:], "--json", str(out)])
    whole_row = json.loads(rows[0])
    out.write_text(json.dumps({"key": whole_row["key"]}) + "\n" + "".join(rows[1:]))
    with pytest.raises(ValueError, match=r"answers.jsonl:1: no answer; remove that line"):
        generate([*flags, "--json", str(out)])


def test_an_autoregressive_model_writes_token_by_token(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(write_autoregressive(tmp_path / "ar", lab.student))
    generate([model, "--prompt", "Hello", "--max-new-tokens", "5", "--json", str(tmp_path / "answers.jsonl")])
    answer = json.loads((tmp_path / "answers.jsonl").read_text())["answer"]
    assert f"--- answer (cut at --max-new-tokens)\n{answer.rstrip()}" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    generate([model, "--chat", "--max-new-tokens", "5"])
    assert printable(answer) in capsys.readouterr().out
    with pytest.raises(ValueError, match="autoregressive and writes token by token, so --threshold does not apply"):
        generate([model, "--prompt", "Hello", "--threshold", "0.5"])


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate, ["./nowhere", "--prompt", "x"])
    assert ended.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_an_autoregressive_model_needs_no_mask_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate([str(ar_folder(tmp_path / "ar", "llama")), "--prompt", "Hello", "--max-new-tokens", "2"])
    assert "2 tokens in" in capsys.readouterr().out
