"""The prepare command: what it says of a model's own limits."""

from __future__ import annotations

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
