"""A teacher in units, one after another, is the whole model: in every family, with its memory where it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tide import models
from megatron_tide.diffusion import BlockDiffusionMask, ModelInput
from megatron_tide.hosting.flat_layers import ALIGNMENT
from megatron_tide.hosting.layerwise import LayerwiseForward, make_flat_layers
from megatron_tide.hosting.place import open_layer_specs
from megatron_tide.hosting.state import ForwardState, TeacherInputs
from megatron_tide.models import load_model, masked_hidden_states, target_logprobs
from megatron_tide.models.layer_specs import layer_bytes, layer_specs_of
from tests.support.lab import stored
from tests.support.models import tiny_student_config, tiny_teacher_config, tiny_wedlm_config, write_hub_folder

CPU = torch.device("cpu")
FAMILIES = {
    "llada2": tiny_teacher_config(),
    "wedlm": tiny_wedlm_config(),
    "qwen3-tied": tiny_student_config(model_type="qwen3"),
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
@pytest.mark.parametrize("output_elsewhere", [True, False])
def test_a_sweep_is_the_whole_model(folder, dtype, output_elsewhere):
    model = load_model(folder, dtype)
    specs, source = open_layer_specs(str(folder))
    output = model.head_weight.detach() if output_elsewhere else None
    flat_layers = make_flat_layers(specs, dtype, output=output, gold=True)
    for flat_layer in flat_layers:
        flat_layer.fill(source, CPU)
    states = [ForwardState(inputs(*sizes)) for sizes in ((11, 9, 1), (24, 17, 2), (5, 0, 3))]
    LayerwiseForward(flat_layers)(states)
    for state in states:
        rows = masked_hidden_states(model, state.inputs.input)
        expected = target_logprobs(rows, model.head_weight, state.inputs.gold)
        bound = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(state.target_logprobs, expected, rtol=0, atol=bound)
        torch.testing.assert_close(state.pair_hidden, rows[state.inputs.pair_row], rtol=0, atol=bound)
        assert state.hidden.numel() == 0, "nothing that was under way is kept"


def test_units_hold_every_tensor_of_the_checkpoint_once(folder):
    """The tied output embedding is part of the head too: first and last unit are never here together."""
    specs, source = open_layer_specs(str(folder))
    flat_layers = make_flat_layers(specs, torch.float32, output=None, gold=True)
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
    layer = make_flat_layers(specs, torch.bfloat16, output=None, gold=True)[2]
    layer.fill(source, CPU)
    key = "model.layers.1.mlp.gate.expert_bias"
    held = layer.tensors(layer.parts[0])["mlp.gate.expert_bias"]
    assert held.dtype == torch.float32
    assert torch.equal(held, stored(folder)[key])


def test_room_without_reading(folder):
    """What ranks other than the first make before the broadcast: as large, and empty but for what is not broadcast."""
    specs, source = open_layer_specs(str(folder))
    read, blank = (make_flat_layers(specs, torch.float32, output=None, gold=True)[-2] for _ in range(2))
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
    flat_layers = make_flat_layers(specs, dtype, output=None, gold=True)
    parts = [specs.embedding, *specs.layers, specs.norm, specs.output]
    checkpoint = sum(layer_bytes(part, dtype) for part in parts)
    assert checkpoint > 16e9 * dtype.itemsize
    assert checkpoint * 0.99 < sum(flat_layer.flat_bytes for flat_layer in flat_layers) < checkpoint * 1.01
