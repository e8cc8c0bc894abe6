"""--log-to: Weights & Biases beside TensorBoard, by a module that stands in for it, and itself where installed."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_tide.choices import METRIC_LOGS
from megatron_tide.config import from_flat
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.metrics import MetricLogger
from megatron_tide.training_checkpoint import METRICS

WORLD = DistContext(rank=0, size=1, device=torch.device("cpu"), host_group=None)
ABOUT = {"train": {"lr": 0.5}}


@pytest.fixture
def stand_in(monkeypatch):
    """Everything that a stand-in of the package is told."""
    told = []

    def init(**settings):
        told.append(("init", settings))
        return SimpleNamespace(
            log=lambda values, step: told.append(("log", step, values)), finish=lambda: told.append(("finish",))
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name in ("WANDB_PROJECT", "WANDB_NAME"):  # which opening sets, and monkeypatch then removes
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return told


def log_two_steps(folder, first):
    logger = MetricLogger(folder, WORLD, 4, first, METRIC_LOGS["wandb"], ABOUT)
    for step in (first + 1, first + 2):
        logger.write(step, {"loss/total": 1.0 / step})
    logger.close()


def test_a_resumed_run_goes_on_with_its_own_run(tmp_path, stand_in):
    (tmp_path / "run").mkdir()
    for first in (0, 1):
        log_two_steps(tmp_path / "run", first)
    (_, first), *logged, (_, second), again, _, _ = stand_in
    assert logged == [("log", 1, {"loss/total": 1.0}), ("log", 2, {"loss/total": 0.5}), ("finish",)]
    assert again == ("log", 2, {"loss/total": 0.5})
    assert first == second
    assert (first["config"], first["resume"], first["dir"]) == (ABOUT, "allow", str(tmp_path / "run"))
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()] == [1, 2, 3]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_local_paths_and_secrets_stay_here(tmp_path, stand_in, monkeypatch):
    (tmp_path / "alice" / "run").mkdir(parents=True)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "alice")
    about = {
        "paths": {"student": "/home/alice/student", "teacher": "org/teacher", "out": "/home/alice/out", "data": ""},
        "teacher": {"teacher_nvme": "/mnt/private"},
        "train": {"lr": 0.5, "deepspeed": "/home/alice/zero1.json"},
    }
    MetricLogger(tmp_path / "alice" / "run", WORLD, 4, 0, METRIC_LOGS["wandb"], about).close()
    assert stand_in[0][1]["config"] == {
        "paths": {"student": "student", "teacher": "org/teacher", "data": ""},
        "teacher": {},
        "train": {"lr": 0.5, "deepspeed": "zero1.json"},
    }
    assert os.environ["WANDB_NAME"] == "~/run"
    assert stand_in[0][1]["settings"] == {"x_disable_meta": True}

    def refuse(**_):
        raise RuntimeError("first\nsecond hf_abcdefghijklmnopqrstuvwxyz0123456789")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(ValueError, match=r"--log-to wandb: first second \(secret\); log in"):
        log_two_steps(tmp_path / "alice" / "run", 0)


def test_what_is_missing_is_one_line_before_anything_is_loaded(chain, tmp_path, monkeypatch, stand_in):
    config = from_flat(chain.run(tmp_path, log_to="wandb"))
    read_run_inputs(config, 1)

    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(ValueError, match=r"--log-to wandb: api_key not configured .*log in .* or set WANDB_MODE=off"):
        log_two_steps(tmp_path, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--log-to wandb: not installed; pip install -r requirements-wandb.txt"):
        read_run_inputs(config, 1)


def test_the_package_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="NOT TESTED: wandb is not installed (requirements-wandb.txt)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "own"))
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(name, "tests")
    log_two_steps(tmp_path, 0)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # its own process writes the end of the file, at its leisure
    while b"loss/total" not in (content := written.read_bytes()):
        assert time.monotonic() < deadline, content
        time.sleep(0.05)
    for local in (str(tmp_path), sys.executable):
        assert local.encode() not in content, local
