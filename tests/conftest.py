"""Fixtures that several packages' tests use."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from megatron_tide.ds_config import use_own_ninja

use_own_ninja()
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = tempfile.mkdtemp(prefix="tide-tests-")  # nothing of a test's goes to the user's own ~/.cache
os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
EXTENSIONS = Path(__file__).resolve().parents[1] / ".venv" / "torch_extensions"
if EXTENSIONS.is_dir():  # where set-up compiled DeepSpeed's ops
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))

LONGEST = ("tests/recipes/", "tests/slurm/", "tests/release/")


def pytest_collection_modifyitems(items):
    """The longest files first, so that of two workers none is left alone with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A tiny chain of the real parts (tests.support.chain.Chain), made once a session; treat it as read-only."""
    from tests.support.chain import make_chain

    return make_chain(tmp_path_factory.mktemp("chain"))
