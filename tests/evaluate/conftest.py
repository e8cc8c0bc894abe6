"""An autoregressive baseline beside the lab's models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.answering import write_autoregressive
from tests.support.lab import Lab


@pytest.fixture(scope="module")
def baseline(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoregressive(tmp_path_factory.mktemp("ar") / "ar", lab.student)
