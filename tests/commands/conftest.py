"""One tiny project for the folder's tests."""

from __future__ import annotations

import pytest

from tests.support.lab import Lab, make_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"))
