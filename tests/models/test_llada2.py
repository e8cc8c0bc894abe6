"""The teacher against a loop-written one that works from the public checkpoint's own keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_tide.diffusion import staircase_mask
from megatron_tide.models import load_model, recompute_layers
from megatron_tide.models.checkpoint_keys import checkpoint_table, module_tensors
from megatron_tide.models.experts import Experts, compiled_sum, weighted_sum
from megatron_tide.models.families import family_of
from megatron_tide.models.llada2 import rotary, rotate
from tests.reference import llada2 as reference
from tests.support.models import hub_tensors, tiny_teacher_config, write_hub_folder

LENGTH = 12
MASKS = {
    "full": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "block_causal": torch.arange(LENGTH)[:, None] // 4 >= torch.arange(LENGTH)[None] // 4,
    "staircase": staircase_mask(LENGTH // 2, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_hub_folder(tmp_path_factory.mktemp("teacher"), tiny_teacher_config(), shards=3)


def ids_of(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 320, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mask", sorted(MASKS))
def test_logits_and_gradients_equal_the_loops(folder: Any, mask: str) -> None:
    config = tiny_teacher_config()
    ids, allowed = ids_of(1)[0], MASKS[mask]
    positions = torch.arange(LENGTH // 2).repeat(2) if mask == "staircase" else torch.arange(LENGTH)
    weights = {key: tensor.double().requires_grad_() for key, tensor in hub_tensors(config).items()}
    wanted = reference.logits(weights, config, ids.tolist(), positions.tolist(), allowed.tolist())

    model = load_model(folder)
    logits = model(ids[None], attention_mask=allowed[None, None], position_ids=positions[None]).logits[0]
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=2e-5)

    probe = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted.backward(probe)
    logits.backward(probe.float())
    gradients = {name: tensor.grad for name, tensor in module_tensors(model).items()}
    for key, slot in checkpoint_table(module_tensors(model), family_of(model)).items():
        if key.endswith("expert_bias"):
            continue
        assert weights[key].grad is not None or "experts" in key, key
        expected = torch.zeros_like(weights[key]) if weights[key].grad is None else weights[key].grad
        torch.testing.assert_close(
            slot.of(gradients).double(), expected, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_no_mask_is_bidirectional_and_additive_equals_bool(folder: Any) -> None:
    model = load_model(folder)
    ids = ids_of(2)
    allowed = MASKS["block_causal"][None, None].expand(2, 1, -1, -1)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(model(ids, allowed).logits, model(ids, added).logits)
    torch.testing.assert_close(model(ids).logits, model(ids, MASKS["full"].expand(2, 1, -1, -1)).logits)
    assert not torch.allclose(model(ids).logits, model(ids, allowed).logits, atol=1e-3)


def test_padding_mask_hides_the_padding(folder: Any) -> None:
    model = load_model(folder)
    ids = ids_of(1)
    padded = torch.cat((ids, torch.full((1, 5), 1)), 1)
    mask = (torch.arange(LENGTH + 5) < LENGTH).long()[None]
    torch.testing.assert_close(model(padded, mask).logits[:, :LENGTH], model(ids).logits)


def test_router_bias_selects_but_does_not_weigh(folder: Any) -> None:
    gate = load_model(folder).model.layers[1].mlp.gate
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    gate.expert_bias.zero_()
    plain, plain_weight = gate(hidden)
    gate.expert_bias[5] = 10.0
    index, weight = gate(hidden)
    assert (index == 5).any(1).all()
    assert not (plain == 5).any(1).all()
    torch.testing.assert_close(weight.sum(1), torch.full((40,), 2.5))
    torch.testing.assert_close(plain_weight.sum(1), torch.full((40,), 2.5))
    score = torch.sigmoid(hidden @ gate.weight.T).gather(1, index)
    torch.testing.assert_close(weight, score / score.sum(1, keepdim=True) * 2.5)


def test_selection_stays_within_the_kept_groups(folder: Any) -> None:
    gate = load_model(folder).model.layers[1].mlp.gate
    index, _ = gate(torch.randn(200, 32, generator=torch.Generator().manual_seed(4)))
    groups = (index // 4).sort(1).values
    distinct = 1 + (groups[:, 1:] != groups[:, :-1]).sum(1)
    assert distinct.max() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_a_loop_when_some_get_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    experts = Experts(hidden=16, width=24, experts=6)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    experts.to(dtype)
    hidden = torch.randn(7, 16).to(dtype).requires_grad_()
    index = torch.tensor([[0, 3], [3, 0], [3, 5], [0, 5], [5, 3], [3, 0], [0, 3]])  # nobody goes to 1, 2 and 4
    weight = torch.rand(7, 2).requires_grad_()

    rows = []
    for token, chosen, share in zip(hidden, index.tolist(), weight):
        row = torch.zeros(16)
        for expert, s in zip(chosen, share):
            up = experts.up_proj[expert] @ token
            gate = torch.nn.functional.silu(experts.gate_proj[expert] @ token)
            row = row + s * (experts.down_proj[expert] @ (gate * up)).float()
        rows.append(row.to(dtype))
    wanted = torch.stack(rows)
    actual = experts(hidden, index, weight)
    exact = dtype == torch.float32
    limits = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(actual, wanted, **limits)

    inputs = (hidden, weight, *experts.parameters())
    # A gradient expanded from one number has zero strides, which grouped matmul itself refuses.
    ours = torch.autograd.grad(actual.sum(), inputs)
    theirs = torch.autograd.grad(wanted.sum(), inputs)
    for ours_one, theirs_one in zip(ours, theirs):
        torch.testing.assert_close(ours_one, theirs_one, **limits)


def test_rotation_turns_half_the_head_and_depends_on_distance_only() -> None:
    x, y = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def score(p: int, q: int) -> torch.Tensor:
        turned = [rotate(v, *rotary(torch.tensor([[n]]), 8, 1e4, torch.float64)) for v, n in ((x, p), (y, q))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(7, 3), score(7, 4))
    turned = rotate(x, *rotary(torch.tensor([[9]]), 8, 1e4, torch.float64))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.equal(turned[..., :8], x[..., :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_one_by_one_are_the_backbone(folder: Any, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype)
    ids = ids_of(2)
    hidden = model.model.word_embeddings(ids)
    rotations = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    for layer in model.model.layers:
        hidden = layer(hidden, None, rotations)
    assert torch.equal(model.model.norm(hidden), model.backbone(ids))


def test_recomputed_layers_give_the_same_gradients(folder: Any) -> None:
    plain, again = load_model(folder), load_model(folder)
    recompute_layers(again)
    calls = []
    again.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, again):
        model.train()
        model(ids_of(2)).logits.square().mean().backward()
    assert len(calls) == 2
    for one, other in zip(plain.parameters(), again.parameters()):
        assert torch.equal(one.grad, other.grad)


def test_bf16_is_near_fp32(folder: Any) -> None:
    ids = ids_of(2)
    exact, rounded = load_model(folder)(ids).logits, load_model(folder, torch.bfloat16)(ids).logits
    error = (exact - rounded.float()).square().mean().sqrt() / exact.square().mean().sqrt()
    assert rounded.dtype == torch.bfloat16
    assert error < 0.1


def test_casts_do_not_reach_the_router_bias(folder: Any) -> None:
    model = load_model(folder)
    bias = model.model.layers[1].mlp.gate.expert_bias.clone()
    model.to(torch.bfloat16)
    kept = model.model.layers[1].mlp.gate.expert_bias
    assert kept.dtype == torch.float32
    assert torch.equal(kept, bias)
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_the_fused_sum_over_experts_is_the_same() -> None:
    """As a GPU compiles it, once for all numbers of tokens; here traced and lowered, without the code generator."""
    fused = compiled_sum("aot_eager")
    for tokens in (5, 9, 1, 300):
        generator = torch.Generator().manual_seed(tokens)
        rows = torch.randn(tokens * 3, 16, generator=generator).bfloat16()
        place = torch.randperm(tokens * 3, generator=generator).view(tokens, 3)
        weight = torch.rand(tokens, 3, generator=generator)
        found = fused(rows, place, weight)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, weighted_sum(rows, place, weight))
        plain = (rows.double()[place] * weight.double()[..., None]).sum(1)
        torch.testing.assert_close(found.double(), plain, rtol=2**-8, atol=1e-6)
