"""The trainer's refusal of a run that cannot fit, and what a strategy needs from the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_tide import models
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.hosting import plan
from megatron_tide.hosting.memory import Machine
from megatron_tide.hosting.plan import GIB, check_plan, run_shape, teacher_needs
from megatron_tide.train import build
from megatron_tide.train.inputs import read_run_inputs
from tests.support.chain import SMALL

SHAPES = Path(models.__file__).parent / "configs"


class Alone:
    size, is_main, device = 1, True, torch.device("cpu")

    def broadcast_object(self, value):
        return value

    def on_all(self, work):
        return work()


class Second(Alone):
    """A rank that hears what the first one found."""

    is_main = False

    def broadcast_object(self, value):
        assert value is None
        return "as the first rank says"


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(plan, "local_machine", lambda ranks, disk: Machine(ranks, 0, GIB // 4))


def test_trainer_refuses_in_one_line(chain, tmp_path, small_machine):
    config = from_flat({**chain.paths(tmp_path / "run"), **SMALL})
    inputs = read_run_inputs(config, 1)
    with pytest.raises(ValueError, match="host memory: needs 0") as refused:
        build.build(config, inputs, Alone())
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith("--teacher-hosting replicated does not fit: host memory: needs 0.")
    assert "nothing would fit here; closest is " in line
    assert line.endswith("(--skip-plan skips this check)")
    with pytest.raises(ValueError, match="as the first rank says"):
        build.build(config, inputs, Second())


def test_refusal_names_the_hosting_that_would_fit(chain, tmp_path, monkeypatch):
    """A teacher of 16 B shapes beside the tiny student, on one GPU of 24 GiB."""
    monkeypatch.setattr(plan, "local_machine", lambda ranks, disk: Machine(ranks, 24 * GIB, 64 * GIB))
    settings = {**chain.paths(tmp_path / "run"), **SMALL, "teacher": str(SHAPES / "llada2_mini.json")}
    settings |= {"teacher_dtype": "bf16"}
    config = from_flat(settings)
    strategy = read_run_inputs(from_flat({**settings, "teacher": str(chain.root / "teacher")}), 1).strategy
    stats = PreparedData.open(settings["data"]).stats
    with pytest.raises(ValueError, match="each GPU: needs 3") as refused:
        check_plan(config, strategy, stats, Alone())
    flags = "this would fit: --teacher-hosting zero3_cpu"
    assert flags in str(refused.value)
    check_plan(from_flat({**settings, "skip_plan": True}), strategy, stats, Alone())


def test_what_cannot_be_planned_is_refused_alike(chain, tmp_path):
    settings = {**chain.paths(tmp_path / "run"), **SMALL}
    inputs = read_run_inputs(from_flat(settings), 1)
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    config = from_flat({**settings, "teacher": str(tmp_path)})
    with pytest.raises(ValueError, match="model_type 'gpt9' is not one of"):
        check_plan(config, inputs.strategy, inputs.data.stats, Alone())


def test_a_tiny_run_is_not_refused_here(chain, tmp_path):
    config = from_flat({**chain.paths(tmp_path / "run"), **SMALL})
    inputs = read_run_inputs(config, 1)
    check_plan(config, inputs.strategy, inputs.data.stats, Alone())


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        ({"strategy": "tide-cross"}, (True, False, False)),
        ({"strategy": "tide-bridge"}, (True, True, True)),
        ({"strategy": "kl"}, (False, True, False)),
        ({"strategy": "tide-shared"}, (True, False, True)),
        ({"strategy": "bd3lm"}, (False, False, False)),
        ({"strategy": "bd3lm", "chunk_objective": "calm", "compdemo": True}, (True, False, True)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_needs_of_a_strategy(flags, needs):
    found = teacher_needs(from_flat(flags).strategy, False, 8, 8)
    assert (found.target_logprobs, found.hidden, found.compdemo) == needs


def test_tide_shared_compares_rows_where_the_vocabularies_are_one():
    found = teacher_needs(from_flat({"strategy": "tide-shared"}).strategy, True, 8, 8)
    assert (found.target_logprobs, found.hidden, found.compdemo) == (False, True, True)


def test_a_student_that_is_a_public_causal_model_is_planned_as_what_it_is_trained_as(chain, tmp_path):
    written = json.loads((chain.root / "student" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "model_type": "qwen3"}))
    needs = teacher_needs(from_flat({"strategy": "bd3lm"}).strategy, False, 9, 9)
    run = run_shape(from_flat({"student": str(tmp_path), "strategy": "bd3lm"}), 1, needs)
    assert run.student_length == 24  # of blocks of 8: two noisy ones and the first clean one


def test_free_memory_of_a_gpu_counts_and_not_all_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * GIB, 80 * GIB))
    here = plan.local_machine(4, None)
    assert (here.ranks, here.nodes) == (2, 2)
    assert here.gpu_bytes == 30 * GIB + plan.CUDA_CONTEXT  # which this process holds already
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GIB, 80 * GIB))
    assert plan.local_machine(4, None).gpu_bytes == 80 * GIB
