"""A teacher of the other family, on the tiny chain's tokenizers."""

from __future__ import annotations

import pytest

from tests.hosting.backends import teacher_folder
from tests.support.models import tiny_wedlm_config


@pytest.fixture(scope="session")
def dense(chain, tmp_path_factory):
    """A WeDLM: Qwen3-shaped, untied."""
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("dense"), tiny_wedlm_config())
