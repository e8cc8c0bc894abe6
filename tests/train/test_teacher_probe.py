"""The teacher's probe: a teacher that knows nothing is refused before the first step, with the likely causes."""

from __future__ import annotations

import contextlib
import io
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tide.data import PreparedData
from tests.support.ranks import run_on_ranks
from tests.support.runs import train_and_tell

pytestmark = pytest.mark.ranks


def refused(flags):
    """The line a rank stops with, and whether anything was trained."""
    try:
        train_and_tell(flags)
    except ValueError as error:
        return str(error)
    return ""


def said_while_training(flags):
    """What a rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_and_tell(flags)
    return printed.getvalue()


@pytest.mark.parametrize("strategy", ["tide-cross", "kl"])
def test_a_teacher_of_random_weights_is_refused_on_every_rank(chain, tmp_path, strategy):
    flags = chain.run(tmp_path / "run", strategy=strategy, max_steps=1, skip_teacher_probe=False)
    lines = run_on_ranks(refused, 2, flags, timeout=200)
    assert lines[0] == lines[1]
    assert "a uniform guess" in lines[0]
    for cause in ("wrong weights", "a wrong mask token", "another chat template", "--skip-teacher-probe"):
        assert cause in lines[0]
    assert not list((tmp_path / "run").glob("step-*"))


def test_weights_that_are_not_finite_are_named(chain, tmp_path):
    broken = tmp_path / "teacher"
    shutil.copytree(chain.root / "teacher", broken)
    file = next(broken.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    flags = chain.run(tmp_path / "run", max_steps=1, skip_teacher_probe=False, teacher=str(broken))
    assert "mean log-prob of the data's tokens is not finite" in run_on_ranks(refused, 1, flags, timeout=200)[0]


def test_a_teacher_of_token_frequencies_passes(chain, tmp_path):
    """It says log-frequencies for every masked token, whatever it sees: little, but more than chance."""
    data = PreparedData.open(chain.root / "data")
    side = data.manifest["teacher"]
    counts = torch.ones(side["vocab_size"])
    for index in range(len(data)):
        counts += torch.from_numpy(np.bincount(data.sample(index).teacher.ids, minlength=len(counts)))
    teacher = tmp_path / "teacher"
    shutil.copytree(chain.root / "teacher", teacher)
    file = next(teacher.glob("*.safetensors"))
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("dense.weight", "down_proj.weight")):
            tensor.zero_()  # every layer passes its input on
    hidden = tensors["lm_head.weight"].shape[1]
    tensors["model.norm.weight"].fill_(1.0)
    tensors["model.word_embeddings.weight"][side["mask_id"]] = torch.eye(hidden)[0]
    tensors["lm_head.weight"].zero_()
    tensors["lm_head.weight"][: len(counts), 0] = (counts / counts.sum()).log() / hidden**0.5
    tensors["lm_head.weight"][len(counts) :, 0] = -100.0
    save_file(tensors, file, metadata={"format": "pt"})
    flags = chain.run(tmp_path / "run", max_steps=1, teacher=str(teacher), skip_teacher_probe=False)
    (said,) = run_on_ranks(said_while_training, 1, flags, timeout=200)
    assert "nats per target token in the first step's data; a uniform guess gives" in said
    assert list((tmp_path / "run").glob("step-*"))
