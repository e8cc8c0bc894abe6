"""What a step does differently on a GPU, as far as a CPU can tell: metrics in bins, fused AdamW, compilation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_tide.config import from_flat
from megatron_tide.objectives.common import BINS, means_by_bin, shares_by_bin
from megatron_tide.optimizer import ADAMW, MUON
from megatron_tide.train import build
from megatron_tide.train.engine import engine_settings
from megatron_tide.train.metrics import MetricAccumulator
from megatron_tide.train.microbatches import Upload

CPU = torch.device("cpu")


class World:
    """One rank."""

    device, size, rank, is_main = CPU, 1, 0, True

    def sum_tensor_(self, tensor):
        return tensor

    def on_all(self, work):
        return work()

    def print_rank0(self, line):
        pass


def test_metrics_in_bins_are_the_means_of_each_bin():
    accumulator = MetricAccumulator()
    generator = torch.Generator().manual_seed(0)
    places = [torch.rand(30, generator=generator) * 0.85 for _ in range(3)]
    places[1][0] = 1.0
    values = [torch.randn(30, generator=generator) for _ in places]
    for place, value in zip(places, values):
        one = MetricAccumulator()
        one.add(
            means_by_bin("mean", place, value)
            | shares_by_bin("share", place)
            | {"all": (value.sum(), torch.tensor(30))}
        )
        one.add_losses({"loss/total": value.sum()})
        accumulator.add_step(one, tokens=7)
    found = accumulator.reduce(World())
    place, value = torch.cat(places), torch.cat(values)
    bins = (place * BINS).long().clamp(max=BINS - 1)
    expected = {"tokens": 21.0, "loss/total": float(value.double().sum() / 3), "all": float(value.double().mean())}
    for number in range(BINS):
        inside = value[bins == number].double()
        expected[f"share/{number / BINS:.1f}"] = len(inside) / len(value)
        if len(inside):
            expected[f"mean/{number / BINS:.1f}"] = float(inside.mean())
    assert found == pytest.approx(expected, abs=1e-6)
    assert "mean/0.8" in found
    assert len(found) == 3 + BINS + int(bins.bincount(minlength=BINS).bool().sum())


def test_fused_adamw_counts_its_steps_where_the_weights_are():
    train = from_flat({}).train
    assert engine_settings(from_flat({}), 1, fused=True)["optimizer"]["params"]["fused"] is True
    assert "fused" not in engine_settings(from_flat({}), 1)["optimizer"]["params"]
    assert "fused" not in ADAMW.deepspeed(train, offloads=True, fused=True)["optimizer"]["params"]
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    for fused, where in ((True, "meta"), (False, "cpu")):
        made = MUON.client(train, False, fused)([{"params": [weight], "moments": ("exp_avg",)}])
        (group,) = made.param_groups
        assert bool(group.get("fused")) == fused
        state = ADAMW.state(made, group, weight)
        assert state["step"].device.type == where
        assert state["exp_avg"].device.type == "meta"


def test_on_a_cpu_nothing_is_uploaded():
    batch = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    upload = Upload(CPU)
    assert upload.receive(upload.send([batch])) == [(CPU, True)]


def test_layers_are_compiled_on_a_gpu_or_when_asked():
    for device, given, expected in (
        ("cpu", None, False),
        ("cuda", None, True),
        ("cuda", False, False),
        ("cpu", True, True),
    ):
        config = from_flat({} if given is None else {"compile_layers": given})
        assert build.compiles(config, SimpleNamespace(device=torch.device(device))) == expected


def test_layers_that_cannot_be_compiled_end_the_run_with_the_flag_that_helps(monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, hidden):
            raise RuntimeError("no compiler here\nmore of it")

    def run(model, inputs):
        return model(inputs)

    monkeypatch.setattr(build, "masked_hidden_states", run)
    batch = SimpleNamespace(student=torch.ones(2, 2), to=lambda *_, **__: batch)
    config, state = from_flat({"compile_layers": True}), SimpleNamespace(step=0, total_steps=1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    context = SimpleNamespace(world=World(), engine=SimpleNamespace(module=model))
    build.check_compiled(config, context, lambda step: [batch], state)
    assert model[0].weight.grad is None, "nothing is added to the first step"
    model.append(Broken())
    with pytest.raises(ValueError, match=r"no compiler here\); --no-compile-layers") as caught:
        build.check_compiled(config, context, lambda step: [batch], state)
    assert "\n" not in str(caught.value)
