"""A run's folder: what was logged and saved stays where the disk fails, and an earlier version's run is refused."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_tide.config import DistillConfig, from_flat
from megatron_tide.train import build, checkpoint
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
            monkeypatch.setattr(checkpoint, "remove_drafts", refuse)
        saved = checkpoint.save(tmp_path, None, TrainState(step=step, total_steps=2), {}, WORLD, keep=1)
        assert (saved / "checksums.json").exists()
    assert "warning: an old checkpoint cannot be removed ([Errno 5] Input/output error)" in capsys.readouterr().out


def test_notes_beside_an_old_checkpoint_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_gathered", lambda engine, world: [("model.safetensors", {"w": torch.ones(2)})])
    first = checkpoint.save(tmp_path, None, TrainState(step=1, total_steps=3), {}, WORLD, keep=1)
    (first / "notes.md").touch()
    assert len({path.stat().st_mode for path in first.iterdir()}) == 1
    for step in (2, 3):
        checkpoint.save(tmp_path, None, TrainState(step=step, total_steps=3), {}, WORLD, keep=1)
    assert [path.name for path in first.iterdir()] == ["notes.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


SIDE = dict.fromkeys(("vocab_size", "mask_id", "eos_id", "pad_id", "length", "block"), 8) | {
    "name": "",
    "fingerprint": "",
}
RUN = {
    "config": {"paths": {"student": "s"}, "strategy": {"strategy": "bd3lm"}},
    "strategy": {"chunk_objective": "none", "distribution_objective": "none"},
    "data": {"student": SIDE, "teacher": None},
    **dict.fromkeys(("fingerprint", "model_folder", "data_fingerprint"), ""),
    "bridge_fingerprint": None,
    "total_steps": 2,
}


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_gathered", lambda engine, world: ())
    run = {**RUN, "deciding": {"lr": 1.0}}
    saved = checkpoint.save(tmp_path, None, TrainState(step=1, total_steps=2), run, WORLD, keep=1)
    with pytest.raises(ValueError, match="the run of another version, which cannot be resumed; use another --out"):
        build.refuse_other_run(saved, {**run, "affects_loss": {"lr": 1.0}})


def test_files_of_the_user_are_not_replaced_by_a_run(tmp_path):
    build.refuse_other_folder(tmp_path)
    for name, content in (("metrics.jsonl", ""), ("run.json", '{"lr": 1}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}.* not of a run"):
            build.refuse_other_folder(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {}}')
    build.refuse_other_folder(tmp_path)


def test_a_run_is_known_by_what_its_student_is_and_not_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_gathered", lambda engine, world: ())
    run = {**RUN, "student_fingerprint": "a", "teacher_fingerprint": None}
    before = {**run, "affects_loss": {**DistillConfig().loss_flags(), "student": "/old/place"}}
    saved = checkpoint.save(tmp_path, None, TrainState(step=1, total_steps=2), before, WORLD, keep=1)
    moved = {**run, "affects_loss": from_flat({"student": "/new/place"}).loss_flags()}
    build.refuse_other_run(saved, moved)
    with pytest.raises(ValueError, match="was trained with another student: use another --out"):
        build.refuse_other_run(saved, {**moved, "student_fingerprint": "b"})


def test_a_flag_that_a_checkpoint_does_not_know_had_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_gathered", lambda engine, world: ())
    new = DistillConfig().loss_flags()
    run = {**RUN, **{f"{side}_fingerprint": "" for side in ("teacher", "student")}}
    old = {**run, "affects_loss": {flag: value for flag, value in new.items() if flag != "lr_schedule"}}
    saved = checkpoint.save(tmp_path, None, TrainState(step=1, total_steps=2), old, WORLD, keep=1)
    build.refuse_other_run(saved, {**run, "affects_loss": new})
    with pytest.raises(ValueError, match="was trained with lr_schedule = 'cosine', this run has 'linear'"):
        build.refuse_other_run(saved, {**run, "affects_loss": {**new, "lr_schedule": "linear"}})
    sums = {"communication_data_type": "bf16"}
    build.refuse_other_run(saved, {**run, "affects_loss": new, "sums": sums})  # not recorded by earlier versions
    saved = checkpoint.save(tmp_path, None, TrainState(step=2, total_steps=2), {**old, "sums": {}}, WORLD, keep=1)
    with pytest.raises(ValueError, match=r"was trained with {} in its --deepspeed JSON, this run has .*bf16"):
        build.refuse_other_run(saved, {**run, "affects_loss": new, "sums": sums})
