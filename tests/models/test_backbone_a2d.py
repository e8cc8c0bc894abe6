"""Students against transformers' own Qwen3 and Llama under the same masks, and what they promise beyond that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_tide.diffusion import staircase_mask
from megatron_tide.models import backbone_a2d, load_model, recompute_layers
from megatron_tide.models.a2d_llama import A2DLlamaConfig, A2DLlamaLMHeadModel
from megatron_tide.models.a2d_qwen3 import A2DQwen3Config, A2DQwen3LMHeadModel
from megatron_tide.models.backbone_a2d import attend, attention_mask_for, grouped_attention
from tests.reference.generate import generate as plain_generate
from tests.support.models import (
    hub_tensors,
    tiny_llama_config,
    tiny_student_config,
    tiny_wedlm_config,
    write_hub_folder,
)

LENGTH = 16
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "qwen3-tied": tiny_student_config(),
    "qwen3-untied": tiny_wedlm_config(),
    "llama-tied": tiny_llama_config(),
    "llama-untied": tiny_llama_config(
        tie_word_embeddings=False,
        head_dim=8,
        attention_bias=False,
        rope_scaling={**LLAMA3, "original_max_position_embeddings": 16},
    ),
}
STUDENTS = {"a2d-qwen3": tiny_student_config(), "a2d-llama": tiny_llama_config()}
CLASSES: dict[str, Any] = {
    "a2d-qwen3": (A2DQwen3Config, A2DQwen3LMHeadModel),
    "a2d-llama": (A2DLlamaConfig, A2DLlamaLMHeadModel),
}


@pytest.fixture(scope="module", params=sorted(STUDENTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("student"), STUDENTS[request.param])


def peer(config: dict[str, Any]) -> Any:
    """transformers' causal model with the same weights, which takes a four-dimensional mask as it is."""
    kept = {key: value for key, value in config.items() if key not in ("model_type", "block_size", "mask_token_id")}
    if config["model_type"] == "a2d-llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**kept, attn_implementation="sdpa"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**kept, attn_implementation="sdpa"))
    tensors = hub_tensors(config)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors)
    return model.eval()


def ids_of(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 256, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


MASKS = {
    "full": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "causal": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
    "staircase": staircase_mask(LENGTH // 2, 4),
    "random": torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(9)) + torch.eye(LENGTH) > 0.5,
}


@pytest.mark.parametrize("case", sorted(CONFIGS))
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_logits_and_gradients_equal_transformers_own(tmp_path: Path, case: str, mask: str) -> None:
    config = CONFIGS[case]
    ours, theirs = load_model(write_hub_folder(tmp_path / "m", config)), peer(config)
    ids, allowed = ids_of(2), MASKS[mask].expand(2, 1, -1, -1)
    positions = torch.arange(LENGTH // 2).repeat(2) if mask == "staircase" else torch.arange(LENGTH)
    positions = positions.expand(2, -1)
    logits = ours(ids, attention_mask=allowed, position_ids=positions).logits
    wanted = theirs(ids, attention_mask=allowed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, wanted)
    for output in (logits, wanted):
        output.square().mean().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=lambda m, n=name: f"{n}: {m}")


def test_no_mask_is_bidirectional(folder: Path) -> None:
    model, ids = load_model(folder), ids_of(2)
    full = MASKS["full"].expand(2, 1, -1, -1)
    torch.testing.assert_close(model(ids).logits, model(ids, full).logits)
    changed = ids.clone()
    changed[:, -1] = 5
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0], atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_masks_in_every_form_agree(folder: Path) -> None:
    model, ids = load_model(folder), ids_of(2)
    allowed = MASKS["staircase"]
    dense = allowed.expand(2, 1, -1, -1)
    wanted = model(ids, dense).logits
    added = torch.zeros(dense.shape).masked_fill(~dense, -torch.inf)
    torch.testing.assert_close(model(ids, added).logits, wanted)
    block = create_block_mask(lambda b, h, q, k: allowed[q, k], 2, None, LENGTH, LENGTH, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, block).logits, wanted)


def test_padding_mask_hides_the_padding(folder: Path) -> None:
    model, ids = load_model(folder), ids_of(1)
    padded = torch.cat((ids, torch.full((1, 7), 1)), 1)
    mask = (torch.arange(LENGTH + 7) < LENGTH).long()[None]
    torch.testing.assert_close(model(padded, mask).logits[:, :LENGTH], model(ids).logits)


@pytest.mark.parametrize("mask", [torch.ones(2, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.int64)])
def test_a_mask_of_no_known_form_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask has shape"):
        attention_mask_for(mask, torch.float32)


def test_an_x0_block_ignores_later_blocks_and_xt(folder: Path) -> None:
    model, ids = load_model(folder), ids_of(1)
    half = LENGTH // 2
    positions, mask = torch.arange(half).repeat(2)[None], MASKS["staircase"][None, None]
    changed = ids.clone()
    changed[:, :half] = 2  # all of xt
    changed[:, half + 4 :] = 3  # the last block of x0
    one, other = (model.backbone(x, mask, positions)[:, half : half + 4] for x in (ids, changed))
    assert torch.equal(one, other)


def test_a_cache_gives_what_one_pass_gives(folder: Path) -> None:
    model, ids = load_model(folder), ids_of(2)
    block_causal = (torch.arange(LENGTH)[:, None] // 4 >= torch.arange(LENGTH)[None] // 4)[None, None]
    wanted = model.backbone(ids, block_causal.expand(2, -1, -1, -1))
    cache = DynamicCache(config=model.config)
    parts = []
    for start in range(0, LENGTH, 4):
        positions = torch.arange(start, start + 4)[None]
        parts.append(model.backbone(ids[:, start : start + 4], None, positions, past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_the_end_token_is_trained_though_it_is_also_the_padding(folder: Path) -> None:
    model = load_model(folder)
    model.backbone(torch.full((1, 4), model.config.pad_token_id)).square().sum().backward()
    assert model.model.embed_tokens.weight.grad[model.config.pad_token_id].abs().max() > 0


def test_casts_do_not_reach_the_rotary_frequencies(folder: Path) -> None:
    model = load_model(folder)
    exact = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(exact, peer(STUDENTS[model.config.model_type]).model.rotary_emb.inv_freq)
    model.bfloat16()
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reloaded = load_model(folder, torch.bfloat16)
    assert torch.equal(model(ids_of(2)).logits, reloaded(ids_of(2)).logits)


def test_recomputed_layers_give_the_same_gradients(folder: Path) -> None:
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


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}]
)
@pytest.mark.parametrize("family", sorted(STUDENTS))
def test_config_reads_both_spellings_of_rope(family: str, rope: dict[str, Any]) -> None:
    values = {key: value for key, value in STUDENTS[family].items() if key not in ("model_type", "rope_theta")}
    config, module = CLASSES[family]
    model = module(config(**values, **rope))
    size = 16
    wanted = 1e4 ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, wanted)


def test_sliding_windows_are_refused() -> None:
    values = {key: value for key, value in tiny_student_config().items() if key != "model_type"}
    config = A2DQwen3Config(**values, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window"):
        A2DQwen3LMHeadModel(config)


def test_transformers_own_save_and_auto_classes_work(folder: Path, tmp_path: Path) -> None:
    ours = load_model(folder)
    ours.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").mask_token_id == 2
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    again = load_model(tmp_path / "saved")
    ids = ids_of(2)
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_it_generates_as_the_plain_sampler(folder: Path) -> None:
    model, prompt = load_model(folder), ids_of(1)[:, :6]
    rule = {"max_new_tokens": 11, "tokens_per_step": 1, "threshold": None}
    found = model.generate(prompt, **rule)[0, 6:].tolist()
    assert found == plain_generate(model, prompt[0].tolist(), block=4, mask_id=2, eos_ids=(1,), **rule)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)], ids=str)
def test_grouped_heads_folded_into_queries_are_the_same_attention(heads: tuple[int, int]) -> None:
    """What CUDA runs where there is a mask; here against the kernel that knows groups, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads[0], 5), (heads[1], 7), (heads[1], 7))
    inputs = [torch.randn(3, *shape, 4, generator=generator).double() for shape in shapes]
    mask = torch.rand(3, 1, 5, 7, generator=generator) > 0.4
    mask[..., 0] = True
    found = []
    for call in (grouped_attention, attend):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        mixed = call(*leaves, mask, 0.7)
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), leaves)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_past_its_limit_of_graphs_compiled_attention_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch goes on uncompiled there, with the full score matrix."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    monkeypatch.setattr(torch, "compile", lambda function, **how: how)
    with config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        backbone_a2d._flex.cache_clear()
        assert backbone_a2d._flex("cuda") == {"dynamic": True}
        assert (config.recompile_limit, config.fail_on_recompile_limit_hit) == (backbone_a2d.GRAPHS, True)
        monkeypatch.undo()
        compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        with config.patch(recompile_limit=1):
            compiled(torch.ones(2))
            with pytest.raises(FailOnRecompileLimitHit):
                compiled(torch.ones(3))
    backbone_a2d._flex.cache_clear()
