"""The trainer's refusal of a run that cannot fit, and what a strategy asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tide import models
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.hosting.plan import check
from megatron_tide.hosting.plan.check import asked_of, check_plan
from megatron_tide.hosting.plan.machine import GIB, Machine
from megatron_tide.train import build
from megatron_tide.train.inputs import read_run_inputs
from tests.support.chain import SMALL

SHAPES = Path(models.__file__).parent / "configs"


class Alone:
    size, is_main, device = 1, True, torch.device("cpu")

    def broadcast_object(self, value):
        return value


class Second(Alone):
    """A rank that hears what the first one found."""

    is_main = False

    def broadcast_object(self, value):
        assert value is None
        return "as the first rank says"


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(check, "local_machine", lambda ranks, disk: Machine(ranks, 0, GIB // 4))


def test_trainer_refuses_in_one_line(chain, tmp_path, small_machine):
    config = from_flat({**chain.paths(tmp_path / "run"), **SMALL})
    inputs = read_run_inputs(config, 1)
    with pytest.raises(ValueError, match="host memory: needs 0") as refused:
        build.build(config, inputs, Alone())
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith("--teacher-hosting replicated does not fit: host memory: needs 0.")
    assert "nothing would fit here; closest is " in line
    assert line.endswith("(--skip-plan goes on regardless)")
    with pytest.raises(ValueError, match="as the first rank says"):
        build.build(config, inputs, Second())


def test_refusal_names_the_hosting_that_would_fit(chain, tmp_path, monkeypatch):
    """A teacher of 16 B shapes beside the tiny student, on one GPU of 24 GiB."""
    monkeypatch.setattr(check, "local_machine", lambda ranks, disk: Machine(ranks, 24 * GIB, 64 * GIB))
    knobs = {**chain.paths(tmp_path / "run"), **SMALL, "teacher": str(SHAPES / "llada2_mini.json")}
    knobs |= {"teacher_dtype": "bf16"}
    config = from_flat(knobs)
    strategy = read_run_inputs(from_flat({**knobs, "teacher": str(chain.root / "teacher")}), 1).strategy
    stats = PreparedData.open(knobs["data"]).stats
    with pytest.raises(ValueError, match="each GPU: needs 3") as refused:
        check_plan(config, strategy, stats, Alone())
    flags = "this would fit: --teacher-hosting zero3 --teacher-deepspeed ds_configs/teacher_zero3_cpu.json"
    assert flags in str(refused.value)
    check_plan(from_flat({**knobs, "skip_plan": True}), strategy, stats, Alone())


def test_what_cannot_be_planned_is_told_alike(chain, tmp_path):
    knobs = {**chain.paths(tmp_path / "run"), **SMALL}
    inputs = read_run_inputs(from_flat(knobs), 1)
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    config = from_flat({**knobs, "teacher": str(tmp_path)})
    with pytest.raises(ValueError, match="model_type 'gpt9' is not one of"):
        check_plan(config, inputs.strategy, inputs.data.stats, Alone())


def test_a_tiny_run_is_not_refused_here(chain, tmp_path):
    config = from_flat({**chain.paths(tmp_path / "run"), **SMALL})
    inputs = read_run_inputs(config, 1)
    check_plan(config, inputs.strategy, inputs.data.stats, Alone())


@pytest.mark.parametrize(
    ("knobs", "asks"),
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
def test_asked_of_a_strategy(knobs, asks):
    asked = asked_of(from_flat(knobs).strategy, False, 8, 8)
    assert (asked.gold, asked.hidden, asked.compdemo) == asks


def test_tide_shared_compares_rows_where_the_vocabularies_are_one():
    asked = asked_of(from_flat({"strategy": "tide-shared"}).strategy, True, 8, 8)
    assert (asked.gold, asked.hidden, asked.compdemo) == (False, True, True)
