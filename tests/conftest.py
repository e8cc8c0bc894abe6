"""Fixtures that several packages' tests use."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from megatron_tide.ds_config import use_own_ninja
from tests.support.shared import made_once

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

NEW_TOKENS = 5  # of the inference benchmark
LONGEST = ("tests/recipes/", "tests/slurm/", "tests/release/")


def pytest_collection_modifyitems(items):
    """The longest files first, so that of two workers none is left alone with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True)
def own_environment():
    """A command in this process sets variables, those of a group of one too; the next test does not see them."""
    before = dict(os.environ)
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        before.pop(name, None)  # perhaps of a fixture that lives on
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A tiny chain of the real parts (tests.support.chain.Chain), made once a session; treat it as read-only."""
    from tests.support.chain import make_chain

    return made_once(tmp_path_factory, "chain", make_chain)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A tiny project (tests.support.lab.Lab), made once a session; treat it as read-only."""
    from tests.support.lab import make_lab

    return made_once(tmp_path_factory, "lab", make_lab)


@pytest.fixture(scope="session")
def inference(chain, tmp_path_factory):
    """The JSON of an inference benchmark of the chain's models, NEW_TOKENS answered twice; made once a session."""
    from tests.support.commands import command

    def measure(folder):
        folder.mkdir()
        models = ["--student", str(chain.root / "student"), "--teacher", str(chain.root / "teacher")]
        out = folder / "inference_benchmark.json"
        sizes = ["--dtype", "float32", "--new-tokens", str(NEW_TOKENS), "--repeats", "2"]
        command("inference-benchmark")([*models, "--out", str(out), *sizes])
        return out

    return made_once(tmp_path_factory, "inference", measure)


@pytest.fixture(scope="session")
def mixture(chain, tmp_path_factory):
    """An LLaDA2 on the chain's tokenizer, with layers of experts large enough for the disk, also as halves in bf16."""
    from tests.hosting.backends import teacher_folder
    from tests.support.models import tiny_teacher_config

    config = tiny_teacher_config(hidden_size=64, moe_intermediate_size=384)
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("mixture"), config)
