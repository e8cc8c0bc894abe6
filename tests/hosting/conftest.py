"""Teachers of the other families, on the tiny chain's tokenizers."""

from __future__ import annotations

import pytest

from tests.hosting.backends import teacher_folder
from tests.support.models import tiny_student_config, tiny_wedlm_config


@pytest.fixture(scope="session")
def dense(chain, tmp_path_factory):
    """A WeDLM: Qwen3-shaped, untied."""
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("dense"), tiny_wedlm_config())


@pytest.fixture(scope="session")
def autoregressive(chain, tmp_path_factory):
    """A Qwen3 as published: tied, each row predicts the next token."""
    config = tiny_student_config(model_type="qwen3")
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("autoregressive"), config)
