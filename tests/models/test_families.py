"""A family is one row and one module: registered from outside the package, it loads, saves, lists its layers, is hosted
layer by layer, and generates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide.diffusion import BlockDiffusionMask, ModelInput
from megatron_tide.hosting.layerwise import (
    ForwardState,
    LayerwiseForward,
    TeacherInputs,
    make_flat_layers,
    open_layer_specs,
)
from megatron_tide.models import (
    fresh_model,
    load_model,
    masked_hidden_states,
    parameter_count,
    target_logprobs,
    write_folder,
)
from megatron_tide.models.checkpoint_keys import module_tensors
from megatron_tide.models.families import FAMILIES, family_of, read_config, register
from megatron_tide.models.layer_specs import layer_specs_of
from tests.reference.generate import generate as plain_generate
from tests.support.models import tiny_llama_config, tiny_student_config, tiny_wedlm_config, write_hub_folder
from tests.support.toy_families import BLOCK, CAUSAL, toy_config

TOYS = {"causal": CAUSAL, "block": BLOCK}


@pytest.fixture(scope="module", params=sorted(TOYS))
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of a family that is known while the test runs."""
    family = TOYS[request.param]
    register(family)
    model = fresh_model(toy_config(family.model_types[0]), seed=7)
    for parameter in model.parameters():  # as initialised, a model of this size says the same everywhere
        parameter.data.mul_(8)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    write_folder(model, folder)
    yield folder, model.eval(), family
    for name in family.model_types:
        del FAMILIES[name]


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(1))


def test_it_loads_what_it_saved(toy: Any) -> None:
    folder, model, family = toy
    loaded = load_model(folder)
    assert family_of(loaded) is family
    assert {name: tensor.shape for name, tensor in module_tensors(loaded).items()} == {
        name: tensor.shape for name, tensor in module_tensors(model).items()
    }
    for name, tensor in module_tensors(loaded).items():
        assert torch.equal(tensor, module_tensors(model)[name]), name
    assert torch.equal(loaded(ids_of(9)).logits, model(ids_of(9)).logits)
    assert parameter_count(folder) == sum(tensor.numel() for tensor in module_tensors(model).values())
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (family.model_types[0], [family.module.__name__])


def test_its_row_names_the_keys_of_its_checkpoint(toy: Any) -> None:
    folder, model, family = toy
    prefix = "transformer." if family is CAUSAL else "model."
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored[f"{prefix}layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)
    assert "lm_head.weight" in stored
    with pytest.raises(ValueError, match="missing num_hidden_layers"):
        load_model(edited(folder, num_hidden_layers=None))


def edited(folder: Path, **changes: Any) -> Path:
    out = folder.parent / "edited"
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    return out


def test_its_layers_are_listed(toy: Any) -> None:
    folder, model, _ = toy
    specs = layer_specs_of(folder)
    names = [
        name for spec in (specs.embedding, *specs.layers, specs.norm, specs.output) for name in spec.names.values()
    ]
    assert len(specs.layers) == model.config.num_hidden_layers
    assert sorted(names) == sorted(module_tensors(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_layer_by_layer(toy: Any, dtype: torch.dtype) -> None:
    folder, *_ = toy
    model, (specs, source) = load_model(folder, dtype), open_layer_specs(str(folder))
    flat_layers = make_flat_layers(specs, dtype, head_weight=None, score_targets=True)
    for flat_layer in flat_layers:
        flat_layer.fill(source, torch.device("cpu"))
    position = torch.arange(12).expand(2, 12)
    attention = BlockDiffusionMask((position // 4).int(), torch.zeros(2, 12, dtype=torch.bool), position < 12)
    rows = torch.tensor([3, 7, 12, 20])
    state = ForwardState(TeacherInputs(ModelInput(ids_of(12), position, attention, rows), torch.arange(4), rows[:0]))
    LayerwiseForward(flat_layers)([state])
    hidden = masked_hidden_states(model, state.inputs.input)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    expected = target_logprobs(hidden, model.head_weight, state.inputs.targets)
    torch.testing.assert_close(state.target_logprobs, expected, rtol=0, atol=bound)


def test_it_generates_as_its_row_says(toy: Any) -> None:
    folder, _, family = toy
    model, prompt = load_model(folder), ids_of(6)[:1]
    if family.generation == "autoregressive":
        found = model.generate(prompt, max_new_tokens=7, do_sample=False)[0, 6:].tolist()
        expected: list[int] = []
        while len(expected) < 7 and 1 not in expected:
            tokens = torch.cat((prompt, torch.tensor([expected], dtype=torch.int64)), 1)
            expected.append(int(model(tokens).logits[0, -1].argmax()))
    else:
        found = model.generate(prompt, max_new_tokens=7)[0, 6:].tolist()
        expected = plain_generate(
            model,
            prompt[0].tolist(),
            block=4,
            mask_id=2,
            eos_ids=(1,),
            max_new_tokens=7,
            tokens_per_step=1,
            threshold=None,
        )
    assert found == expected


@pytest.mark.parametrize("shape", ["qwen3", "llama"])
def test_a_plain_model_is_causal_and_trains_as_a_student(tmp_path: Path, shape: str) -> None:
    config = tiny_student_config() if shape == "qwen3" else tiny_llama_config()
    folder = write_hub_folder(tmp_path / shape, config | {"model_type": shape})
    causal, student = load_model(folder), load_model(folder, as_student=True)
    changed = ids_of(8)
    changed[:, -1] = 5
    assert torch.equal(causal(ids_of(8)).logits[:, :-1], causal(changed).logits[:, :-1])
    assert not torch.allclose(student(ids_of(8)).logits[:, :-1], student(changed).logits[:, :-1], atol=1e-3)
    full = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    torch.testing.assert_close(causal.backbone(ids_of(8), full), student.backbone(ids_of(8)))
    write_folder(student, tmp_path / "student")
    write_folder(causal, tmp_path / "causal")
    assert [read_config(tmp_path / name)[0].generation for name in ("student", "causal")] == [
        "block_diffusion",
        "autoregressive",
    ]
    assert json.loads((tmp_path / "student/config.json").read_text())["model_type"] == f"a2d-{shape}"


def test_a_shared_vocabulary_teacher_is_written_as_a_student(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "wedlm", tiny_wedlm_config())
    write_folder(load_model(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "a2d-qwen3"
