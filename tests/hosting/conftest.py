"""Teachers of the two families, on the tiny chain's tokenizers."""

from __future__ import annotations

import pytest

from tests.hosting.backends import teacher_folder
from tests.support.models import tiny_teacher_config, tiny_wedlm_config


@pytest.fixture(scope="session")
def mixture(chain, tmp_path_factory):
    """An LLaDA2 whose layers of experts are large enough for the disk, also when two ranks share them in bf16."""
    config = tiny_teacher_config(hidden_size=64, moe_intermediate_size=384)
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("mixture"), config)


@pytest.fixture(scope="session")
def dense(chain, tmp_path_factory):
    """A WeDLM: Qwen3-shaped, untied."""
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("dense"), tiny_wedlm_config())
