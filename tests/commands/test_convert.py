"""tools/convert_to_hf.py as a user calls it: a whole folder, or one line and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.lab import Lab, write_checkpoint

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_to_hf.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """From another folder and without PYTHONPATH, as a user may call it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=240)


@pytest.mark.slow
def test_converts_a_run_folder(lab: Lab, tmp_path: Path) -> None:
    write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    done = run(tmp_path / "run", tmp_path / "hf", "--name", "tiny-tide", "--license", "mit", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "# tiny-tide" in card
    assert "license: mit" in card
    again = run(tmp_path / "run", tmp_path / "hf")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


UNCHECKED = ["nowhere", "out", "--skip-parity", "--push-to-hub", "me/mine"]


@pytest.mark.parametrize(
    "arguments", [["nowhere", "out"], ["nowhere", "out", "--max-shard-size", "huge"], ["one"], UNCHECKED]
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(("error: ", "convert_to_hf.py: error: "))


def test_help_teaches() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "python tools/convert_to_hf.py runs/quickstart/tide-cross" in done.stdout
