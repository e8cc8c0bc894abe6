"""LLaDA2 one token, one head, one expert at a time, from the public checkpoint's tensors by their public keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Config = dict[str, Any]


def logits(
    weights: Weights, config: Config, ids: Sequence[int], positions: Sequence[int], allowed: list[list[bool]]
) -> Tensor:
    """[L, V] for one sequence: token ids, their positions, and ``allowed[q][k]``, whether q attends to k."""
    hidden = [weights["model.word_embeddings.weight"][token] for token in ids]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        normed = [_norm(x, weights[f"{layer}.input_layernorm.weight"], config) for x in hidden]
        mixed = attention(weights, f"{layer}.attention", config, normed, positions, allowed)
        hidden = [x + y for x, y in zip(hidden, mixed)]
        normed = [_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config) for x in hidden]
        dense = number < config["first_k_dense_replace"]
        feed = [(feed_forward if dense else mixture)(weights, f"{layer}.mlp", config, x) for x in normed]
        hidden = [x + y for x, y in zip(hidden, feed)]
    return torch.stack([weights["lm_head.weight"] @ _norm(x, weights["model.norm.weight"], config) for x in hidden])


def attention(
    weights: Weights,
    name: str,
    config: Config,
    hidden: list[Tensor],
    positions: Sequence[int],
    allowed: list[list[bool]],
) -> list[Tensor]:
    size, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys, values = [], [], []
    for x, position in zip(hidden, positions):
        fused = weights[f"{name}.query_key_value.weight"] @ x
        parts = [fused[head * size : (head + 1) * size] for head in range(heads + 2 * kv_heads)]
        q = [_norm(part, weights[f"{name}.query_layernorm.weight"], config) for part in parts[:heads]]
        k = [_norm(part, weights[f"{name}.key_layernorm.weight"], config) for part in parts[heads : heads + kv_heads]]
        queries.append([rotate(part, position, config) for part in q])
        keys.append([rotate(part, position, config) for part in k])
        values.append(parts[heads + kv_heads :])
    outputs = []
    for query, row in zip(queries, allowed):
        seen = [place for place, may in enumerate(row) if may]
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = torch.stack([query[head] @ keys[place][shared] / math.sqrt(size) for place in seen])
            share = scores.softmax(0)
            mixed.append(sum(share[i] * values[place][shared] for i, place in enumerate(seen)))
        outputs.append(weights[f"{name}.dense.weight"] @ torch.cat(mixed))
    return outputs


def rotate(x: Tensor, position: int, config: Config) -> Tensor:
    """Dimension i of the rotated part turns with dimension i + half of it; the rest passes."""
    size = int(len(x) * config["partial_rotary_factor"])
    half = size // 2
    turned = list(x.unbind())
    for i in range(half):
        angle = position / config["rope_theta"] ** (2 * i / size)
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(turned)


def feed_forward(weights: Weights, name: str, config: Config, x: Tensor) -> Tensor:
    gate = weights[f"{name}.gate_proj.weight"] @ x
    return weights[f"{name}.down_proj.weight"] @ (gate * gate.sigmoid() * (weights[f"{name}.up_proj.weight"] @ x))


def route(weights: Weights, name: str, config: Config, x: Tensor) -> dict[int, Tensor]:
    """expert -> its weight, for one token."""
    score = (weights[f"{name}.gate.weight"] @ x).sigmoid()
    biased = (score + weights[f"{name}.gate.expert_bias"]).tolist()
    inside = config["num_experts"] // config["n_group"]
    groups = [list(range(start, start + inside)) for start in range(0, config["num_experts"], inside)]
    groups.sort(key=lambda group: -sum(sorted((biased[expert] for expert in group), reverse=True)[:2]))
    candidates = [expert for group in groups[: config["topk_group"]] for expert in group]
    chosen = sorted(candidates, key=lambda expert: -biased[expert])[: config["num_experts_per_tok"]]
    total = sum(score[expert] for expert in chosen) if len(chosen) > 1 else 1.0
    return {expert: score[expert] / total * config["routed_scaling_factor"] for expert in chosen}


def mixture(weights: Weights, name: str, config: Config, x: Tensor) -> Tensor:
    output = feed_forward(weights, f"{name}.shared_experts", config, x)
    for expert, share in route(weights, name, config, x).items():
        output = output + share * feed_forward(weights, f"{name}.experts.{expert}", config, x)
    return output


def _norm(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    return x / torch.sqrt((x * x).mean() + config["rms_norm_eps"]) * weight
