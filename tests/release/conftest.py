"""A checkpoint and its release; and what a refused conversion must leave as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tide.files import TEMPORARY
from megatron_tide.release import Options, convert
from megatron_tide.release import convert as convert_function
from tests.support.lab import Lab, write_checkpoint

convert_module = __import__("megatron_tide.release.convert", fromlist=["convert"])


@pytest.fixture(scope="module")
def checkpoint(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(lab, tmp_path_factory.mktemp("run"), start=lab.student, data=lab.data, distilled=True)


@pytest.fixture(scope="module")
def release(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release") / "tiny-student"
    convert_function(checkpoint, out, Options())
    return out


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on the parity gate, which costs a process that imports transformers."""
    monkeypatch.setattr(convert_module, "check_parity", lambda *_: {"logit_rows": 0, "greedy_tokens": 0})


def assert_refused(checkpoint: Path, out: Path, word: str, **options: Any) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=word) as caught:
        convert(checkpoint, out, Options(**options))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(out.parent.glob(f"{TEMPORARY}*")) == []
