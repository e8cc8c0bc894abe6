"""Tiny models of the true architectures, written as hub-format folders key by key, without our own writer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tiny_student_config(**changes: Any) -> dict[str, Any]:
    """A two-layer Qwen3-BD3LM of 256 tokens, tied, grouped heads; the keys of a public config.json."""
    return {
        "model_type": "a2d-qwen3",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
        "eos_token_id": 1,
        "mask_token_id": 2,
        "block_size": 4,
        **changes,
    }


def tiny_llama_config(**changes: Any) -> dict[str, Any]:
    """A two-layer Llama as a student, tied, grouped heads, without head_dim, as many a public config.json."""
    values = tiny_student_config(model_type="a2d-llama", rope_theta=1e5, hidden_size=64, rms_norm_eps=1e-5)
    del values["head_dim"]
    return {**values, **changes}


def tiny_wedlm_config(**changes: Any) -> dict[str, Any]:
    """A two-layer WeDLM: Qwen3-shaped, untied, its mask id not in the config."""
    values = tiny_student_config(model_type="wedlm", tie_word_embeddings=False)
    for key in ("mask_token_id", "block_size", "pad_token_id"):
        del values[key]
    return {**values, **changes}


def tiny_sdar_config(**changes: Any) -> dict[str, Any]:
    """A two-layer SDAR with every key of a public config.json: untied, blocks of 4, rope_theta a plain number."""
    code = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"}
    return {
        **tiny_student_config(model_type="sdar", tie_word_embeddings=False, rope_theta=1000000),
        "architectures": ["SDARForCausalLM"],
        "auto_map": {**code, "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "flex_attention",
        "bos_token_id": 1,
        "fuse_cross_entropy": True,
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
        "transformers_version": "4.52.4",
        "use_cache": False,
        "use_sliding_window": False,
        **changes,
    }


def tiny_opdlm_config(**changes: Any) -> dict[str, Any]:
    """A two-layer OPDLM: a student made of a Qwen3, whose config.json states neither its mask token nor its blocks."""
    values = tiny_student_config(tie_word_embeddings=True)
    for key in ("mask_token_id", "block_size"):
        del values[key]
    return {
        **values,
        "architectures": ["A2DQwen3LMHeadModel"],
        "auto_map": {"AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel"},
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * values["num_hidden_layers"],
        "max_window_layers": 28,
        "use_sliding_window": False,
        **changes,
    }


def tiny_teacher_config(**changes: Any) -> dict[str, Any]:
    """A three-layer LLaDA2 (the first one dense) of 320 tokens: 16 experts in 4 groups, top 4, one shared."""
    return {
        "model_type": "llada2_moe",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "rope_theta": 6e5,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "eos_token_id": 1,
        "mask_token_id": 2,
        "block_size": 4,
        **changes,
    }


def hub_tensors(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors under the public checkpoint's keys; nothing stays neutral, neither norms nor biases."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in _shapes(config):
        tensor = torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        if key.endswith("norm.weight"):
            tensor += 1
        # Stored in fp32 by the public checkpoints, whatever the rest is in.
        tensors[key] = tensor if key.endswith("expert_bias") else tensor.to(dtype)
    return tensors


def write_hub_folder(
    folder: Path, config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 1
) -> Path:
    """A folder in hub format (config.json, safetensors, an index if sharded) holding :func:`hub_tensors`; -> it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(config, seed, dtype)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    file_of = {key: names[place % shards] for place, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if file_of[key] == name}, folder / name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stream_hub_folder(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """As :func:`write_hub_folder`, but a layer at a time, each a shard, all from one pool of random numbers: for models
    that should never be whole in memory. -> bytes of each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_shard: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for key, shape in _shapes(config):
        part = ".".join(key.split(".")[:3]) if ".layers." in key else "outer"
        by_shard.setdefault(f"{part}.safetensors", []).append((key, shape))
    largest = max(math.prod(shape) for shapes in by_shard.values() for _, shape in shapes)
    pool = torch.randn(largest + 10007, generator=torch.Generator().manual_seed(0)) * config["hidden_size"] ** -0.5
    file_of, sizes = {}, {}
    for name, shapes in by_shard.items():
        tensors = {}
        for key, shape in shapes:
            start = len(file_of) * 31 % 10007
            values = pool[start : start + math.prod(shape)].view(shape)
            tensors[key] = values.clone() if key.endswith("expert_bias") else values.to(dtype, copy=True)
            file_of[key] = name
        save_file(tensors, folder / name)
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(config))
    return sizes


def _shapes(config: dict[str, Any]) -> Shapes:
    if config["model_type"] == "llada2_moe":
        return _llada2(config)
    return _decoder(config, normed_heads="llama" not in config["model_type"])


def _decoder(config: dict[str, Any], normed_heads: bool) -> Shapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", hidden // heads)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows * size, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * size)
        if normed_heads:
            yield f"{layer}.self_attn.q_norm.weight", (size,)
            yield f"{layer}.self_attn.k_norm.weight", (size,)
        yield from _feed_forward(f"{layer}.mlp", hidden, width)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _llada2(config: dict[str, Any]) -> Shapes:
    hidden, size, experts = config["hidden_size"], config["head_dim"], config["num_experts"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["moe_intermediate_size"]
    yield "model.word_embeddings.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.attention.query_key_value.weight", ((heads + 2 * kv_heads) * size, hidden)
        yield f"{layer}.attention.dense.weight", (hidden, heads * size)
        yield f"{layer}.attention.query_layernorm.weight", (size,)
        yield f"{layer}.attention.key_layernorm.weight", (size,)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if number < config["first_k_dense_replace"]:
            yield from _feed_forward(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{layer}.mlp.gate.weight", (experts, hidden)
        yield f"{layer}.mlp.gate.expert_bias", (experts,)
        for expert in range(experts):
            yield from _feed_forward(f"{layer}.mlp.experts.{expert}", hidden, width)
        yield from _feed_forward(f"{layer}.mlp.shared_experts", hidden, width * config["num_shared_experts"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _feed_forward(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)
