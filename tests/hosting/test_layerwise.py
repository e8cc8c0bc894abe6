"""One sweep per optimizer step: each unit is fetched once, whatever the accumulation and the passes, and in time."""

from __future__ import annotations

import itertools

import pytest

from megatron_tide.config import from_flat
from megatron_tide.train import build
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.step import global_counts, to_device, train_step
from tests.hosting.backends import hostings, joined
from tests.support.lab import stored
from tests.support.ranks import run_on_ranks

STEPS = 4
ZERO3 = ("zero3", "zero3_cpu", "zero3_nvme")


def train_and_watch(runs):
    """By run: of each optimizer step, what happened, in order: (what, unit, bytes). One process trains them all."""
    found = {}
    with joined() as world:
        for name, knobs in runs.items():
            config = from_flat(knobs)
            inputs = read_run_inputs(config, world.size)
            parts, windows = build.build(config, inputs, world)
            events = watch(parts.backend.engine.module.flat_layers)
            found[name] = []
            for step in range(STEPS):
                window = windows(step)
                assert len(window) == inputs.sampler.accumulation
                counts, _ = global_counts(window, world, False)
                train_step(parts, to_device(window, world.device), counts, 0.0)
                found[name].append(list(events))
                events.clear()
    return found


def watch(flat_layers):
    """A list that fills with what happens to units: from disk, to whole, in (called), out (done)."""
    events, flats = [], [flat_layer.flat for flat_layer in flat_layers]
    place = {id(flat): number for number, flat in enumerate(flats)}

    def note(what, owner, call):
        inner = getattr(owner, call)

        def noted(parameters, *rest, **more):
            parameters = list(parameters)
            for flat in parameters:
                size = flat.ds_numel if what == "gather" else flat.ds_tensor.ds_numel
                events.append((what, place[id(flat)], size * flat.element_size()))
            return inner(parameters, *rest, **more)

        setattr(owner, call, noted)

    for number, (flat_layer, flat) in enumerate(zip(flat_layers, flats)):
        note("gather", flat, "all_gather_coalesced")
        flat_layer.register_forward_pre_hook(lambda *_, n=number: events.append(("in", n, 0)))
        flat_layer.register_forward_hook(lambda *_, n=number: events.append(("out", n, 0)))
    if flats[0].nvme_swapper is not None:
        note("read", flats[0].nvme_swapper, "swap_in")
    return events


@pytest.fixture(scope="module")
def watched(chain, mixture, tmp_path_factory):
    """Runs on two ranks: every kind of ZeRO-3 with accumulation 2; accumulation 1 and 4 and CompDemo off for one."""
    every = hostings(tmp_path_factory.mktemp("disk"))
    choices = [(hosting, 2, True) for hosting in ZERO3]
    choices += [
        ("zero3_nvme", *choice) for choice in itertools.product((1, 2, 4), (True, False)) if choice != (2, True)
    ]
    runs = {
        (hosting, accumulation, compdemo): chain.run(
            tmp_path_factory.mktemp("run"),
            teacher=str(mixture),
            strategy="tide-cross",
            compdemo=compdemo,
            micro_batch_size=8 // (2 * accumulation),
            **every[hosting],
        )
        for hosting, accumulation, compdemo in choices
    }
    return run_on_ranks(train_and_watch, 2, runs, timeout=280)


@pytest.mark.ranks
def test_a_step_fetches_the_teacher_once(watched, mixture):
    teacher = sum(tensor.nbytes for name, tensor in stored(mixture).items() if not name.endswith("expert_bias"))
    for rank in watched:
        assert len(rank) == 8
        for steps in rank.values():
            assert len(steps) == STEPS
            for events in steps:
                gathers = [(flat_layer, size) for what, flat_layer, size in events if what == "gather"]
                assert sorted(flat_layer for flat_layer, _ in gathers) == list(range(5))
                # flat tensors start on 128 bytes each
                assert sum(size for _, size in gathers) == pytest.approx(teacher, rel=0.01)


@pytest.mark.ranks
def test_a_step_reads_each_share_from_disk_once(watched, mixture):
    for rank in watched:
        for (hosting, *_), steps in rank.items():
            for events in steps:
                reads = [(flat_layer, size) for what, flat_layer, size in events if what == "read"]
                large = {
                    flat_layer: size for what, flat_layer, size in events if what == "gather" and size / 2 >= 2**20
                }
                assert len(large) == 2, "the two layers of experts"
                assert dict(reads) == (
                    {flat_layer: size / 2 for flat_layer, size in large.items()} if hosting == "zero3_nvme" else {}
                )
                assert len(reads) == len(dict(reads))


@pytest.mark.ranks
def test_the_next_unit_is_fetched_while_one_is_at_work(watched):
    """From the second sweep on; the first tells DeepSpeed the order."""
    for rank in watched:
        for steps in rank.values():
            for events in steps[1:]:
                at = {(what, flat_layer): number for number, (what, flat_layer, _) in enumerate(events)}
                for flat_layer in range(1, 5):
                    ahead = at.get(("read", flat_layer), at["gather", flat_layer])
                    assert ahead < at["in", flat_layer - 1], "asked for before the one at work starts"
                    assert flat_layer == 1 or at["gather", flat_layer] > at["out", flat_layer - 2], (
                        "one ahead, not two: memory"
                    )
