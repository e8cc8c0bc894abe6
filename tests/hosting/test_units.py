"""A teacher in units, one after another, is the whole model: in every family, with its memory where it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tide import models
from megatron_tide.diffusion import ModelInput, Pattern
from megatron_tide.hosting.passage import Passage, Question
from megatron_tide.hosting.place import open_sections
from megatron_tide.hosting.sweep import Sweep, make_units
from megatron_tide.hosting.units import ALIGNMENT
from megatron_tide.models import gold_logp, load_model, masked_rows
from megatron_tide.models.sections import section_bytes, sections_of
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


def question(length, rows, seed):
    """Two sequences, the second one shorter, in blocks of four that see what is before them."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(length).expand(2, length).contiguous()
    valid = position < torch.tensor([[length], [length - 3]])
    pattern = Pattern((position // 4).int(), torch.zeros_like(valid), valid)
    chosen = torch.randperm(2 * length, generator=generator)[:rows]
    ids = torch.randint(0, 256, (2, length), generator=generator)
    gold = torch.randint(0, 256, (rows,), generator=generator)
    return Question(ModelInput(ids, position, pattern, chosen), gold, torch.arange(rows)[::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_elsewhere", [True, False])
def test_a_sweep_is_the_whole_model(folder, dtype, output_elsewhere):
    model = load_model(folder, dtype)
    sections, source = open_sections(str(folder))
    output = model.head_weight.detach() if output_elsewhere else None
    units = make_units(sections, dtype, output=output, gold=True)
    for unit in units:
        unit.fill(source, CPU)
    passages = [Passage(question(*sizes)) for sizes in ((11, 9, 1), (24, 17, 2), (5, 0, 3))]
    Sweep(units)(passages)
    for passage in passages:
        rows = masked_rows(model, passage.question.input)
        expected = gold_logp(rows, model.head_weight, passage.question.gold)
        bound = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(passage.gold_logp, expected, rtol=0, atol=bound)
        torch.testing.assert_close(passage.pair_hidden, rows[passage.question.pair_row], rtol=0, atol=bound)
        assert passage.hidden.numel() == 0, "nothing that was under way is kept"


def test_units_hold_every_tensor_of_the_checkpoint_once(folder):
    """The tied output embedding is part of the head too: first and last unit are never here together."""
    sections, source = open_sections(str(folder))
    units = make_units(sections, torch.float32, output=None, gold=True)
    tensors = stored(folder)
    tied = tensors["model.embed_tokens.weight"].numel() if "lm_head.weight" not in tensors else 0
    sizes = []
    for unit in units:
        unit.fill(source, CPU)
        sizes += [tensor.numel() for part in unit.parts for tensor in unit.tensors(part).values()]
        starts = [tensor.storage_offset() * 4 for part in unit.parts for tensor in unit.tensors(part).values()]
        assert all(start % ALIGNMENT == 0 for start in starts)
    assert sum(sizes) == sum(tensor.numel() for tensor in tensors.values()) + tied


def test_a_routers_bias_keeps_its_precision(tmp_path):
    """Rounded to bf16, it would choose other experts."""
    folder = write_hub_folder(tmp_path, tiny_teacher_config(), dtype=torch.bfloat16)
    sections, source = open_sections(str(folder))
    layer = make_units(sections, torch.bfloat16, output=None, gold=True)[2]
    layer.fill(source, CPU)
    key = "model.layers.1.mlp.gate.expert_bias"
    held = layer.tensors(layer.parts[0])["mlp.gate.expert_bias"]
    assert held.dtype == torch.float32
    assert torch.equal(held, stored(folder)[key])


def test_room_without_reading(folder):
    """What ranks other than the first make before the broadcast: as large, and empty but for what is not broadcast."""
    sections, source = open_sections(str(folder))
    read, blank = (make_units(sections, torch.float32, output=None, gold=True)[-2] for _ in range(2))
    read.fill(source, CPU)
    blank.fill(source, CPU, read=False)
    assert blank.flat.shape == read.flat.shape
    assert not blank.flat.any()
    assert blank.exact.keys() == read.exact.keys()
    assert all(torch.equal(blank.exact[name], read.exact[name]) for name in read.exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_tensors_add_less_than_a_percent(dtype):
    """At a size worth hosting: LLaDA2.0-mini's own shapes; nothing is allocated."""
    sections = sections_of(Path(models.__file__).parent / "configs" / "llada2_mini.json")
    units = make_units(sections, dtype, output=None, gold=True)
    parts = [sections.embedding, *sections.layers, sections.norm, sections.output]
    checkpoint = sum(section_bytes(part, dtype) for part in parts)
    assert checkpoint > 16e9 * dtype.itemsize
    assert checkpoint * 0.99 < sum(unit.flat_bytes for unit in units) < checkpoint * 1.01
