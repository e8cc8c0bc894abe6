"""Rows of packed, padded batches against one plain [xt ; x0] forward per sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tide.data.batch import Tokens
from megatron_tide.diffusion import ATTENTION_LAYOUTS, ModelInput, staircase_mask
from megatron_tide.models import compile_layers, load_model, masked_hidden_states, recompute_layers
from tests.diffusion.samples import STUDENT_BLOCK, STUDENT_MASK, collate, make
from tests.support.models import tiny_student_config, tiny_teacher_config, write_hub_folder

VOCAB = 1024  # the samples' ids go to 901
ITEMS = [
    make(1, (9, 3), [(1, 1), (2, 1), (1, 3), (3, 1)]),
    make(2, (2, 5), [(1, 1)] * 9),
    make(3, (0, 2), [(2, 2), (1, 1)]),
]


@pytest.fixture(scope="module", params=["student", "teacher"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"student": tiny_student_config, "teacher": tiny_teacher_config}[request.param]
    return write_hub_folder(tmp_path_factory.mktemp(request.param), config(vocab_size=VOCAB))


def noised() -> tuple[Tokens, torch.Tensor]:
    tokens = collate(ITEMS, padding=3).student
    place = torch.arange(tokens.ids.shape[1])
    maskable = (place >= tokens.prompt[:, None]) & (place < tokens.length[:, None])
    coin = torch.rand(maskable.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return tokens, maskable & coin


def ask(tokens: Tokens, masked: torch.Tensor, context: str) -> ModelInput:
    sample, position = masked.nonzero(as_tuple=True)
    return ATTENTION_LAYOUTS[context](tokens, masked, sample, position, block=STUDENT_BLOCK, mask_id=STUDENT_MASK)


def test_staircase_rows_equal_a_plain_doubled_forward(folder: Path) -> None:
    model = load_model(folder)
    tokens, masked = noised()
    rows = masked_hidden_states(model, ask(tokens, masked, "staircase"))
    wanted = []
    for ids, mask, length in zip(tokens.ids, masked, tokens.length.tolist()):
        clean, mask = ids[:length], mask[:length]
        both = torch.cat((clean.masked_fill(mask, STUDENT_MASK), clean))[None]
        positions = torch.arange(length).repeat(2)[None]
        hidden = model.backbone(both, staircase_mask(length, STUDENT_BLOCK)[None, None], positions)
        wanted.append(hidden[0, :length][mask])
    torch.testing.assert_close(rows, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_full_context_rows_equal_forwards_without_padding(folder: Path) -> None:
    model = load_model(folder)
    tokens, masked = noised()
    rows = masked_hidden_states(model, ask(tokens, masked, "full"))
    wanted = []
    for ids, mask, length in zip(tokens.ids, masked, tokens.length.tolist()):
        hidden = model.backbone(ids[:length].masked_fill(mask[:length], STUDENT_MASK)[None])
        wanted.append(hidden[0][mask[:length]])
    torch.testing.assert_close(rows, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_padding_to_full_tiles_changes_no_row(folder: Path) -> None:
    model = load_model(folder)
    tokens, masked = noised()
    for context in ("staircase", "full"):
        asked = ask(tokens, masked, context)
        wide = asked.padded(128)
        assert wide.input_ids.shape[1] == 128
        assert wide.padded(64) is wide
        assert torch.equal(wide.input_ids.flatten()[wide.rows], asked.input_ids.flatten()[asked.rows])
        torch.testing.assert_close(
            masked_hidden_states(model, wide), masked_hidden_states(model, asked), rtol=1e-4, atol=1e-5
        )


def test_no_rows_still_reach_every_parameter(folder: Path) -> None:
    model = load_model(folder)
    tokens, masked = noised()
    asked = ask(tokens, masked, "staircase")
    rows = masked_hidden_states(model, replace(asked, rows=asked.rows[:0]))
    assert rows.shape == (0, model.config.hidden_size)
    rows.sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without <= {"lm_head.weight"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_layers_give_the_same_rows_and_gradients(folder: Path) -> None:
    """Traced and lowered as on a GPU, without the code generator: one graph for the layers, a second for any length."""
    torch._dynamo.reset()
    plain, compiled = load_model(folder).train(), load_model(folder).train()
    compile_layers(compiled, "aot_eager")
    tokens, masked = noised()
    for first in (0, 1, 2):
        some = Tokens(**{name: value[first:] for name, value in vars(tokens).items()})
        inputs = ask(some, masked[first:], "staircase")
        found = []
        for model in (plain, compiled):
            rows = masked_hidden_states(model, inputs)
            trained = list(model.model.parameters())
            found.append((rows, *torch.autograd.grad(rows.square().sum(), trained, allow_unused=True)))
        for mine, theirs in zip(*found, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    with torch.no_grad():  # flex_attention has a backward pass on a GPU only
        masks = inputs.attention.flex(), inputs.attention.dense()
        by_tiles, by_pairs = (compiled.backbone(inputs.input_ids, mask, inputs.position_ids) for mask in masks)
    torch.testing.assert_close(by_tiles, by_pairs, rtol=1e-4, atol=1e-5)
    recompute_layers(compiled)
    rows, wanted = masked_hidden_states(compiled, inputs), masked_hidden_states(plain, inputs)
    weights = (model.model.layers[0].input_layernorm.weight for model in (compiled, plain))
    mine, theirs = (torch.autograd.grad(of.sum(), weight)[0] for of, weight in zip((rows, wanted), weights))
    torch.testing.assert_close(mine, theirs)
