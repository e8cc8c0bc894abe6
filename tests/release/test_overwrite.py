"""convert --overwrite: results and notes in the folder stay, what a loader would read of the old release does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_tide.release import Options, Score, convert, write_scores
from tests.support.lab import Lab, write_checkpoint

SCORE = Score(task="gsm8k", metric="accuracy, %", value=1.0, low=0.5, high=2.0, count=9, how="as published")


@pytest.fixture(scope="module")
def checkpoint(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(lab, tmp_path_factory.mktemp("run"), start=lab.student, data=lab.data, distilled=True)


def test_results_stay_and_old_weights_go(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lab: Lab
) -> None:
    out = tmp_path / "out"
    convert(checkpoint, out, Options(skip_parity=True))
    write_scores(out, [SCORE])
    (out / "evaluation").mkdir()
    (out / "evaluation/cache.sqlite").write_bytes(b"hours of work")
    (out / "scores.json").write_text("{}")
    (out / "notes.md").write_text("mine")
    (out / "LICENSE.txt").write_text("mine")
    (out / "link").symlink_to("/nowhere")
    os.mkfifo(out / "evaluation/pipe")
    for name in ("model-00001-of-00002.safetensors", "vocab.json", "old.py"):
        (out / name).write_text("old")
    for name in ("custom_generate/generate.py", "additional_chat_templates/other.jinja"):  # transformers reads them
        (out / name).parent.mkdir()
        (out / name).write_text("old")
    convert(checkpoint, out, Options(skip_parity=True, overwrite=True))
    assert (out / "evaluation/cache.sqlite").read_bytes() == b"hours of work"
    assert (out / "scores.json").read_text() == "{}"
    assert (out / "notes.md").read_text() == (out / "LICENSE.txt").read_text() == "mine"
    assert (out / "link").is_symlink()
    assert not any((out / name).exists() for name in ("model-00001-of-00002.safetensors", "vocab.json", "old.py"))
    assert not any((out / name).exists() for name in ("custom_generate", "additional_chat_templates"))
    said = capsys.readouterr().out
    assert (
        "custom_generate, model-00001-of-00002.safetensors, old.py, vocab.json of the release before are removed"
        in said
    )
    assert "| gsm8k |" not in (out / "README.md").read_text()  # other weights: a file more
    assert "left out" in said

    write_scores(out, [SCORE])
    convert(checkpoint, out, Options(skip_parity=True, overwrite=True))
    assert "| gsm8k | accuracy, % | 1 " in (out / "README.md").read_text()
    assert capsys.readouterr().out == ""

    with (out / "README.md").open("a") as card:
        card.write("Licensed to my employer.\n")
    convert(checkpoint, out, Options(skip_parity=True, overwrite=True))
    assert "its README.md was edited, and is kept as README." in capsys.readouterr().out
    (kept,) = out.glob("README.*.md")
    assert kept.read_text().endswith("Licensed to my employer.\n")


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer_config.json"])
def test_scores_of_another_configuration_or_template_do_not_stay(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """The release was edited and then measured; made again, it has the checkpoint's settings."""
    out = tmp_path / "out"
    convert(checkpoint, out, Options(skip_parity=True))
    file = out / name
    edited = file.read_text() + "!" if name.endswith(".jinja") else json.dumps({**json.loads(file.read_text()), "x": 1})
    file.write_text(edited)
    write_scores(out, [SCORE])
    convert(checkpoint, out, Options(skip_parity=True, overwrite=True))
    assert "| gsm8k |" not in (out / "README.md").read_text()
