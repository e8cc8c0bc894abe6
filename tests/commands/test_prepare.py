"""The prepare command: what it says of a model's own limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import command
from tests.support.lab import Lab


def test_a_length_beyond_the_models_positions_is_told(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(lab.student.parent / "rows.jsonl"), "--student", str(lab.student), "--workers", "1"]
    for length, told in (("512", 0), ("516", 1)):
        command("prepare")([*flags, "--student-length", length, "--out", str(tmp_path / length)])
        warning = f"--student-length {length}: {lab.student} was made for 512 tokens (max_position_embeddings)"
        assert capsys.readouterr().err.count(warning) == told


def test_text_that_a_tokenizer_changes_is_told(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (lab.student.parent / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("value_0", "VALUE_0", 1))
    folder = Path(shutil.copytree(lab.student, tmp_path / "lower"))
    for normalizer, told in ((None, ""), ({"type": "Lowercase"}, "1 of the first 24 rows, as the model will write it")):
        spec = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": normalizer}))
        flags = ["--data", str(tmp_path / "rows.jsonl"), "--student", str(folder), "--student-length", "64"]
        command("prepare")([*flags, "--workers", "1", "--out", str(tmp_path / f"out-{bool(told)}")])
        err = capsys.readouterr().err
        assert told in err if told else "the tokenizer changes" not in err
