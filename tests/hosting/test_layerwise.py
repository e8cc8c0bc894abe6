"""A teacher in flat layers is the whole model; one sweep per optimizer step fetches each layer once, in time."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tide import models
from megatron_tide.config import from_flat
from megatron_tide.diffusion import BlockDiffusionMask, ModelInput
from megatron_tide.hosting.layerwise import (
    ALIGNMENT,
    ForwardState,
    LayerwiseForward,
    TeacherInputs,
    make_flat_layers,
    open_layer_specs,
)
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.models import load_model, masked_hidden_states, target_logprobs
from megatron_tide.models.layer_specs import layer_specs_of
from megatron_tide.train import build
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.step import global_counts, to_device, train_step
from tests.hosting.backends import hostings, joined
from tests.support.lab import stored
from tests.support.models import (
    tiny_llama_config,
    tiny_student_config,
    tiny_teacher_config,
    tiny_wedlm_config,
    write_hub_folder,
)
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")
FAMILIES = {
    "llada2": tiny_teacher_config(),
    "wedlm": tiny_wedlm_config(),
    "qwen3-tied": tiny_student_config(model_type="qwen3"),
    "a2d-llama": tiny_llama_config(tie_word_embeddings=False),
    "llama-tied": tiny_llama_config(model_type="llama"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp(request.param), FAMILIES[request.param], seed=4, shards=2)


def inputs(length, rows, seed):
    """Two sequences, the second one shorter, in blocks of four that see what is before them."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(length).expand(2, length).contiguous()
    valid = position < torch.tensor([[length], [length - 3]])
    attention = BlockDiffusionMask((position // 4).int(), torch.zeros_like(valid), valid)
    chosen = torch.randperm(2 * length, generator=generator)[:rows]
    ids = torch.randint(0, 256, (2, length), generator=generator)
    gold = torch.randint(0, 256, (rows,), generator=generator)
    return TeacherInputs(ModelInput(ids, position, attention, chosen), gold, torch.arange(rows)[::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_elsewhere", [True, False])
def test_a_sweep_is_the_whole_model(folder, dtype, head_elsewhere):
    model = load_model(folder, dtype)
    specs, source = open_layer_specs(str(folder))
    head = model.head_weight.detach() if head_elsewhere else None
    flat_layers = make_flat_layers(specs, dtype, head_weight=head, score_targets=True)
    for flat_layer in flat_layers:
        flat_layer.fill(source, CPU)
    states = [ForwardState(inputs(*sizes)) for sizes in ((11, 9, 1), (24, 17, 2), (5, 0, 3))]
    LayerwiseForward(flat_layers)(states)
    for state in states:
        rows = masked_hidden_states(model, state.inputs.input)
        expected = target_logprobs(rows, model.head_weight, state.inputs.targets)
        bound = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(state.target_logprobs, expected, rtol=0, atol=bound)
        torch.testing.assert_close(state.pair_hidden, rows[state.inputs.pair_index], rtol=0, atol=bound)
        assert state.hidden.numel() == 0, "nothing that was under way is kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_copy_is_the_model_and_takes_a_window(folder, dtype):
    """On a CPU, where it takes one micro-batch at a time, to the last bit; all of them at once within rounding."""
    strategy = SimpleNamespace(needs_hidden=True, needs_target_logprobs=True)
    teacher = ReplicatedTeacher.open(str(folder), {}, dtype, strategy, SimpleNamespace(device=CPU))
    model, batches, expected = load_model(folder, dtype), [], []
    for given in (inputs(11, 9, 1), inputs(24, 17, 2), inputs(5, 0, 3)):
        batches.append(
            SimpleNamespace(teacher=given.input, teacher_targets=given.targets, pair_teacher_index=given.pair_index)
        )
        rows = masked_hidden_states(model, given.input)
        expected.append((target_logprobs(rows, model.head_weight, given.targets), rows[given.pair_index]))
    for at_once, bound in ((1, 0.0), (None, 1e-5 if dtype == torch.float32 else 0.05)):
        teacher.at_once = at_once
        for outputs, (logprobs, hidden) in zip(teacher.score(batches), expected, strict=True):
            torch.testing.assert_close(outputs.target_logprobs, logprobs, rtol=0, atol=bound)
            torch.testing.assert_close(outputs.hidden, hidden, rtol=0, atol=bound)
            assert torch.equal(outputs.head_weight, model.head_weight)
    assert teacher.score([]) == []


def test_flat_layers_hold_every_tensor_of_the_checkpoint_once(folder):
    """The tied output embedding is part of the head too: first and last layer are never here together."""
    specs, source = open_layer_specs(str(folder))
    flat_layers = make_flat_layers(specs, torch.float32, head_weight=None, score_targets=True)
    tensors = stored(folder)
    tied = tensors["model.embed_tokens.weight"].numel() if "lm_head.weight" not in tensors else 0
    sizes = []
    for flat_layer in flat_layers:
        flat_layer.fill(source, CPU)
        sizes += [tensor.numel() for part in flat_layer.parts for tensor in flat_layer.tensors(part).values()]
        starts = [
            tensor.storage_offset() * 4 for part in flat_layer.parts for tensor in flat_layer.tensors(part).values()
        ]
        assert all(start % ALIGNMENT == 0 for start in starts)
    assert sum(sizes) == sum(tensor.numel() for tensor in tensors.values()) + tied


def test_a_routers_bias_keeps_its_precision(tmp_path):
    """Rounded to bf16, it would choose other experts."""
    folder = write_hub_folder(tmp_path, tiny_teacher_config(), dtype=torch.bfloat16)
    specs, source = open_layer_specs(str(folder))
    layer = make_flat_layers(specs, torch.bfloat16, head_weight=None, score_targets=True)[2]
    layer.fill(source, CPU)
    key = "model.layers.1.mlp.gate.expert_bias"
    held = layer.tensors(layer.parts[0])["mlp.gate.expert_bias"]
    assert held.dtype == torch.float32
    assert torch.equal(held, stored(folder)[key])


def test_room_without_reading(folder):
    """What ranks other than the first make before the broadcast: as large, and empty but for what is not broadcast."""
    specs, source = open_layer_specs(str(folder))
    read, blank = (make_flat_layers(specs, torch.float32, head_weight=None, score_targets=True)[-2] for _ in range(2))
    read.fill(source, CPU)
    blank.fill(source, CPU, read=False)
    assert blank.flat.shape == read.flat.shape
    assert not blank.flat.any()
    assert blank.exact.keys() == read.exact.keys()
    assert all(torch.equal(blank.exact[name], read.exact[name]) for name in read.exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_tensors_add_less_than_a_percent(dtype):
    """At a size worth hosting: LLaDA2.0-mini's own shapes; nothing is allocated."""
    specs = layer_specs_of(Path(models.__file__).parent / "configs" / "llada2_mini.json")
    flat_layers = make_flat_layers(specs, dtype, head_weight=None, score_targets=True)
    parts = [specs.embedding, *specs.layers, specs.norm, specs.output]
    checkpoint = sum(tensor.numel() * dtype.itemsize for part in parts for tensor in part.tensors.values())
    assert checkpoint > 16e9 * dtype.itemsize
    assert checkpoint * 0.99 < sum(flat_layer.flat_bytes for flat_layer in flat_layers) < checkpoint * 1.01


STEPS = 4
ZERO3 = ("zero3", "zero3_cpu", "zero3_nvme")


def train_and_watch(runs):
    """By run: of each optimizer step, what happened, in order: (what, layer, bytes). One process trains them all."""
    found = {}
    with joined() as world:
        for name, flags in runs.items():
            config = from_flat(flags)
            inputs = read_run_inputs(config, world.size)
            parts, loader = build.build(config, inputs, world)
            events = watch(parts.backend.engine.module.flat_layers)
            found[name] = []
            for step in range(STEPS):
                microbatches = loader(step)
                assert len(microbatches) == inputs.sampler.accumulation
                counts, _ = global_counts(microbatches, world, False)
                train_step(parts, to_device(microbatches, world.device), counts, 0.0)
                found[name].append(list(events))
                events.clear()
    return found


def watch(flat_layers):
    """A list that fills with what happens to layers: from disk, to whole, in (called), out (done)."""
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
