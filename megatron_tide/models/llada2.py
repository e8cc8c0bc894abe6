"""The teacher: LLaDA2 (``llada2_moe``), numerically equal to the public format's semantics.

Parameter names are those of the public checkpoints, except that a layer's experts are three stacked tensors
(``mlp.experts.{gate,up,down}_proj``); :mod:`megatron_tide.models.checkpoint_keys` translates both ways. Layers are
called one by one with plain tensors, ``layer(hidden, cos, sin, mask)``, so they can be streamed, sharded or pipelined.

Shapes: N batch, L length, H hidden size, V vocabulary, D head dimension, R rotated part of D.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MaskedLMOutput

from megatron_tide.models.a2d_qwen3 import Mask, attend, attention_mask_for
from megatron_tide.models.decoding_a2d import BlockCache
from megatron_tide.models.experts import Experts, Router
from megatron_tide.models.generation_a2d import BlockGeneration
from megatron_tide.models.llada2_config import LLaDA2Config

KVUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to x's type, times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


def rotary(position_ids: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, L, size] for positions [N, L]: angles in fp32, the same in both halves of ``size``."""
    steps = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids.float()[..., None] / theta ** (steps / size)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R of D dimensions of x [N, heads, L, D] by cos, sin [N, L, R]; the rest passes."""
    turned, passed = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
    return torch.cat((turned, passed), -1)


class Attention(nn.Module):
    """Grouped-query attention with a fused q, k, v projection (in that order) and a norm on each head's q and k."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.query_layernorm = RMSNorm(self.size, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.size, config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, kv_update: KVUpdate | None = None
    ) -> Tensor:
        fused = self.query_key_value(hidden).unflatten(-1, (-1, self.size))
        query, key, value = (
            part.transpose(1, 2) for part in fused.split((self.heads, self.kv_heads, self.kv_heads), 2)
        )
        query = rotate(self.query_layernorm(query), cos, sin)
        key = rotate(self.key_layernorm(key), cos, sin)
        if kv_update is not None:
            key, value = kv_update(key, value)
        mixed = attend(query, key, value, mask, self.size**-0.5)
        return self.dense(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The gated feed-forward network of dense layers and of the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class MoEBlock(nn.Module):
    """Routed experts plus the shared experts, which see every token."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.gate = Router(
            config.hidden_size,
            config.num_experts,
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.routed_scaling_factor,
        )
        self.experts = Experts(config.hidden_size, config.moe_intermediate_size, config.num_experts)
        self.shared_experts: FeedForward | None = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = FeedForward(config.hidden_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        routed = self.experts(flat, *self.gate(flat)).view_as(hidden)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden)


class LLaDA2Layer(nn.Module):
    """One decoder layer; the first ``first_k_dense_replace`` have a dense feed-forward network."""

    def __init__(self, config: LLaDA2Config, index: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp: nn.Module = MoEBlock(config)
        if index < config.first_k_dense_replace:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, kv_update: KVUpdate | None = None
    ) -> Tensor:
        """hidden [N, L, H]; cos, sin [N or 1, L, R]; mask as ``attend`` takes it -> [N, L, H].

        ``kv_update`` is given this layer's keys and values and returns those to attend to: the cache of generation.
        """
        return self.mlp_block(self.attention_block(hidden, cos, sin, mask, kv_update))

    def attention_block(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None, kv_update: KVUpdate | None = None
    ) -> Tensor:
        """The first half: attention, between the positions of each sequence."""
        return hidden + self.attention(self.input_layernorm(hidden), cos, sin, mask, kv_update)

    def mlp_block(self, hidden: Tensor) -> Tensor:
        """The second half: the feed-forward network or the experts, for each position on its own."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LLaDA2Decoder(nn.Module):
    """Embedding, layers, norm. ``embed`` -> each of ``layers`` -> ``norm`` is the whole of :meth:`forward`."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden [N, L, H], cos and sin [N or 1, L, R]: all that the layers are called with but the mask."""
        hidden = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return hidden, *rotary(position_ids, self.config.rotary_size, self.config.rope_theta, hidden.dtype)

    def forward(
        self, input_ids: Tensor, mask: Mask | None, position_ids: Tensor | None, cache: BlockCache | None = None
    ) -> Tensor:
        hidden, cos, sin = self.embed(input_ids, position_ids)
        for index, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, cos, sin, mask, use_reentrant=False)
            else:
                kv_update = None if cache is None else functools.partial(cache.update, layer_idx=index)
                hidden = layer(hidden, cos, sin, mask, kv_update)
        return self.norm(hidden)


class LLaDA2MoeModelLM(BlockGeneration, nn.Module):
    """LLaDA2 with its head: ``model(input_ids, attention_mask=None, position_ids=None).logits`` is [N, L, V].

    ``generate`` decodes in blocks, as the student does. No mask means bidirectional, a mask is taken as given (None,
    [N, L] padding, [N, 1, Q, K] bool or additive, BlockMask).
    """

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.model = LLaDA2Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, [V, H]."""
        return self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BlockCache | None = None,
    ) -> Tensor:
        """Normed hidden states [N, L, H]; ``past_key_values`` is attended to and appended to."""
        return self.model(input_ids, attention_mask_for(attention_mask, self.dtype), position_ids, past_key_values)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Mask | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        return MaskedLMOutput(logits=self.lm_head(self.backbone(input_ids, attention_mask, position_ids)))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """transformers' name for: keep one hidden state per layer, recompute the rest in the backward pass."""
        self.model.checkpointing = True

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights from torch's current random state: matrices N(0, initializer_range), norms 1, router bias 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range)
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoEBlock):
                layer.mlp.gate.expert_bias.zero_()
