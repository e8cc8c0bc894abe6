"""From outside the package: an objective, a noise schedule, a strategy and a hosting, each one line, in a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from megatron_tide import choices, cli
from megatron_tide.choices import CHUNK_OBJECTIVES, NOISE_SCHEDULES, STRATEGIES, TEACHER_HOSTINGS, Choice, StrategySpec
from megatron_tide.config import DistillArgs
from megatron_tide.diffusion import NoiseSchedule
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.objectives.chunk import ChunkObjective
from tests.support.ranks import run_on_ranks
from tests.support.runs import train_and_tell

TOYS = {"strategy": "toy-gap", "noise_schedule": "toy-square", "teacher_hosting": "toy-count"}


@dataclass(frozen=True, kw_only=True)
class Square(NoiseSchedule):
    """alpha(t) = 1 - t^2, so the weight is 2 / t."""

    def rate(self, t):
        return t**2

    def inverse_weight(self, t):
        return t / 2


def squared_gap(student, target):
    """(p_s - p_t)^2."""
    return (student.log_p.exp() - target.log_p.exp()) ** 2


class CountingTeacher(ReplicatedTeacher):
    """Logs how often it was called."""

    calls = 0

    def score(self, microbatches):
        self.calls += 1
        return super().score(microbatches)

    def metrics(self):
        return {"teacher/calls": float(self.calls)}


def add_toys():
    """The four lines."""
    NOISE_SCHEDULES["toy-square"] = Choice("a share t^2 of the tokens is masked", Square())
    CHUNK_OBJECTIVES["toy_gap"] = Choice("squared gap", ChunkObjective("toy_gap", squared_gap, reversed=False))
    STRATEGIES["toy-gap"] = StrategySpec(meaning="the squared gap of chunks", chunk="toy_gap")
    TEACHER_HOSTINGS["toy-count"] = Choice("a copy on every rank that counts", CountingTeacher)


@pytest.fixture
def toys():
    add_toys()
    yield
    del NOISE_SCHEDULES["toy-square"], CHUNK_OBJECTIVES["toy_gap"], STRATEGIES["toy-gap"], TEACHER_HOSTINGS["toy-count"]


def train_with_toys(flags):
    """One rank, which has to know the toys itself."""
    add_toys()
    return train_and_tell(flags)


def test_flags_and_help_know_them(toys, capsys):
    argv = ["--strategy", "toy-gap", "--noise-schedule", "toy-square", "--chunk-objective", "toy_gap"]
    argv += ["--teacher-hosting", "toy-count"]
    values = cli.given(DistillArgs, argv, "", "distill")
    run = cli.build(DistillArgs, values).run
    assert (run.strategy.strategy, run.strategy.noise_schedule) == ("toy-gap", "toy-square")
    with pytest.raises(SystemExit):
        cli.given(DistillArgs, ["--help"], "", "distill")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("toy-gap", "toy-square", "toy_gap", "toy-count"))


def test_without_their_lines_they_are_refused():
    with pytest.raises(ValueError, match=r"--noise-schedule toy-square: choose one of linear"):
        cli.build(DistillArgs, {"noise_schedule": "toy-square"})


def test_the_flags_need_no_torch():
    code = "import sys, megatron_tide.config; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


@pytest.mark.ranks
def test_a_run_trains_with_them(chain, tmp_path):
    plain, toy = tmp_path / "plain", tmp_path / "toy"
    curves = {
        out: run_on_ranks(train_with_toys, 1, chain.run(out, max_steps=2, **flags), timeout=200)[0]
        for out, flags in ((plain, {"strategy": "bd3lm"}), (toy, TOYS))
    }
    for curve in curves.values():
        assert all(torch.tensor(curve[name]).isfinite().all() for name in ("loss/total", "train/grad_norm"))
    assert all(0 < loss < 1 for loss in curves[toy]["loss/distill"])
    assert curves[toy]["teacher/calls"] == [1, 2], "once per step"
    assert curves[toy]["loss/denoise"][0] != curves[plain]["loss/denoise"][0]
    said = json.loads((toy / "run.json").read_text())["strategy"]
    assert (said["strategy"], said["chunk_objective"], said["noise_schedule"]) == ("toy-gap", "toy_gap", "toy-square")


def test_the_tables_are_as_they_were():
    """The toys of this file do not leak into other tests."""
    assert not [
        word
        for table in (choices.NOISE_SCHEDULES, choices.STRATEGIES, TEACHER_HOSTINGS)
        for word in table
        if "toy" in word
    ]
