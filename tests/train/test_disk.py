"""A run on a disk that fails: what it logged and saved before stays, and what is not needed does not stop it."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_tide.train import checkpoint
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.metrics import MetricLogger
from megatron_tide.training_checkpoint import METRICS, TrainState

WORLD = DistContext(rank=0, size=1, device=torch.device("cpu"), host_group=None)


def refuse(*_, **__):
    raise OSError(5, "Input/output error")


def test_a_resumed_log_is_there_before_and_after(tmp_path, monkeypatch):
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            MetricLogger(tmp_path, WORLD, total_steps=4, first_step=2)
    assert (tmp_path / METRICS).read_text() == "".join(lines)
    MetricLogger(tmp_path, WORLD, total_steps=4, first_step=2).close()
    assert (tmp_path / METRICS).read_text() == "".join(lines[:2])


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "_gathered", lambda engine, world: ())
    for step in (1, 2):
        if step == 2:
            monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
        saved = checkpoint.save(tmp_path, None, TrainState(step=step, total_steps=2), {}, WORLD, keep=1)
        assert (saved / "checksums.json").exists()
    assert "warning: an old checkpoint cannot be removed ([Errno 5] Input/output error)" in capsys.readouterr().out
