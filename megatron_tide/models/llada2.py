"""The teacher: LLaDA2 (``llada2_moe``), numerically equal to the public format's semantics.

Parameter names are those of the public checkpoints, except that a layer's experts are three stacked tensors
(``mlp.experts.{gate,up,down}_proj``); its row in :mod:`megatron_tide.models.families` translates both ways. Layers are
called as transformers' are, so they can be streamed, sharded or put into a pipeline.

Shapes: N batch, L length, H hidden size, V vocabulary, D head dimension, R rotated part of D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from megatron_tide.bounds import plain
from megatron_tide.models.backbone_a2d import Mask, WithHead, attend, attention_mask_for
from megatron_tide.models.decoding_a2d import BlockCache
from megatron_tide.models.experts import Experts, Router
from megatron_tide.models.generation_a2d import BlockGenerationMixin

Rotations = tuple[Tensor, Tensor]  # cos, sin [N or 1, L, R]

# Keys that change the computation, with the only implemented value; other values are refused.
_FIXED = {
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_scaling": None,
}

# Keys of public files that do not change what is computed. They are written back; any other key (auto_map, paths, ...)
# is not.
_ALSO_WRITTEN = (
    "attention_dropout",
    "embedding_dropout",
    "max_window_layers",
    "moe_router_enable_expert_bias",
    "norm_head",
    "norm_softmax",
    "norm_topk_prob",
    "num_nextn_predict_layers",
    "output_dropout",
    "output_router_logits",
    "router_dtype",
    "score_function",
    "sliding_window",
    "use_cache",
    "use_qk_norm",
    "use_rmsnorm",
    "use_sliding_window",
    *_FIXED,
)


class LLaDA2Config(PretrainedConfig):
    """Shapes and ids of a LLaDA2 model; ``extra`` holds the file's keys that are written back as they were.

    The public configuration class's defaults are placeholders of another model, so keys that define shapes have no
    default here: :meth:`read` refuses a file without them.
    """

    model_type = "llada2_moe"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    partial_rotary_factor: float = 0.5
    rotary_dim: int | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    mask_token_id: int | None = None
    block_size: int = 32
    extra: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for broken, rule in self._rules():
            if broken:
                raise ValueError(f"llada2_moe config: {rule}")
        super().__post_init__(**kwargs)

    def _rules(self) -> Iterator[tuple[bool, str]]:
        experts, groups, kept, chosen = self.num_experts, self.n_group, self.topk_group, self.num_experts_per_tok
        yield groups < 1 or experts % groups != 0, f"n_group {groups} must divide num_experts {experts}"
        inside = experts // groups
        yield inside < 2, f"a group needs at least two experts, n_group {groups} gives {inside}; lower it"
        yield not 0 < kept <= groups, f"topk_group {kept} must be from 1 to n_group {groups}"
        reach = kept * inside
        yield not 0 < chosen <= reach, f"num_experts_per_tok {chosen} exceeds the {reach} experts of the kept groups"
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        yield heads % kv_heads != 0, f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}"
        size = self.rotary_size
        yield (
            size % 2 != 0 or not 0 < size <= self.head_dim,
            f"rotary size {size} must be even, within head_dim {self.head_dim}",
        )
        for name in ("hidden_size", "moe_intermediate_size"):
            # Grouped matmul needs rows aligned to 16 bytes: 8 numbers of bf16.
            yield getattr(self, name) % 8 != 0, f"{name} {getattr(self, name)} must be a multiple of 8"

    @property
    def rotary_size(self) -> int:
        """Number of rotated dimensions per head."""
        return self.rotary_dim or int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def read(cls, values: dict[str, Any]) -> LLaDA2Config:
        """Read the public ``config.json``'s dict. ValueError for a missing key or a variant that is not implemented."""
        values = dict(values)
        rope = values.pop("rope_parameters", None) or {}
        values.setdefault("rope_theta", rope.get("rope_theta"))
        if values.get("head_dim") is None and values.get("hidden_size") and values.get("num_attention_heads"):
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        for key, only in _FIXED.items():
            if values.get(key, only) != only:
                raise ValueError(f"llada2_moe config: {key} = {values[key]!r} is not supported (only {only!r})")
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise ValueError(f"llada2_moe config: missing {', '.join(missing)}")
        own = {name: value for name, value in values.items() if name in _OWN}
        return cls(**own, extra=plain({key: values[key] for key in _ALSO_WRITTEN if key in values}))

    @staticmethod
    def write(config: LLaDA2Config) -> dict[str, Any]:
        """The dict of the public ``config.json``."""
        return config.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The dict of ``config.json``, with the keys that are written back as they were."""
        own = {name: getattr(self, name) for name in _OWN if name != "rotary_dim" or self.rotary_dim is not None}
        return {**_FIXED, **(self.extra or {}), **own, "model_type": self.model_type}


_FIELDS = [item for item in fields(LLaDA2Config) if item.name in LLaDA2Config.__annotations__ and item.name != "extra"]
_OWN = [item.name for item in _FIELDS]
_REQUIRED = [item.name for item in _FIELDS if item.default is MISSING]


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


def rotary(position_ids: Tensor, size: int, theta: float, dtype: torch.dtype) -> Rotations:
    """Cosines and sines [N, L, size] for positions [N, L]: angles in fp32, the same in both halves of ``size``."""
    steps = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids.float()[..., None] / theta ** (steps / size)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class RotaryEmbedding(nn.Module):
    """:func:`rotary` with a config's numbers, of the type of ``hidden``; it stores nothing."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.size, self.theta = config.rotary_size, config.rope_theta

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Rotations:
        return rotary(position_ids, self.size, self.theta, hidden.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R of D dimensions of x [N, heads, L, D] by cos, sin [N, L, R]; the rest passes."""
    turned, passed = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
    return torch.cat((turned, passed), -1)


class Attention(nn.Module):
    """Grouped-query attention with a fused q, k, v projection (in that order) and a norm on each head's q and k."""

    def __init__(self, config: LLaDA2Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.query_layernorm = RMSNorm(self.size, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.size, config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, mask: Mask | None, rotations: Rotations, cache: BlockCache | None) -> Tensor:
        fused = self.query_key_value(hidden).unflatten(-1, (-1, self.size))
        query, key, value = (
            part.transpose(1, 2) for part in fused.split((self.heads, self.kv_heads, self.kv_heads), 2)
        )
        query = rotate(self.query_layernorm(query), *rotations)
        key = rotate(self.key_layernorm(key), *rotations)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
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


class LLaDA2Layer(GradientCheckpointingLayer):
    """One decoder layer; the first ``first_k_dense_replace`` have a dense feed-forward network."""

    def __init__(self, config: LLaDA2Config, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, index)
        self.mlp: nn.Module = MoEBlock(config)
        if index < config.first_k_dense_replace:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Mask | None,
        position_embeddings: Rotations,
        past_key_values: BlockCache | None = None,
    ) -> Tensor:
        """hidden [N, L, H]; mask as ``attend`` takes it; cos, sin [N or 1, L, R] -> [N, L, H]."""
        return self.mlp_block(self.attention_block(hidden, attention_mask, position_embeddings, past_key_values))

    def attention_block(
        self,
        hidden: Tensor,
        attention_mask: Mask | None,
        position_embeddings: Rotations,
        past_key_values: BlockCache | None = None,
    ) -> Tensor:
        """The first half: attention, between the positions of each sequence."""
        mixed = self.attention(self.input_layernorm(hidden), attention_mask, position_embeddings, past_key_values)
        return hidden + mixed

    def mlp_block(self, hidden: Tensor) -> Tensor:
        """The second half: the feed-forward network or the experts, for each position on its own."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LLaDA2Decoder(nn.Module):
    """Embedding, layers, norm."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self, input_ids: Tensor, mask: Mask | None, position_ids: Tensor | None, cache: BlockCache | None = None
    ) -> Tensor:
        hidden = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotations = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask, rotations, past_key_values=cache)
        return self.norm(hidden)


class LLaDA2MoeModelLM(WithHead, BlockGenerationMixin, PreTrainedModel):  # type: ignore[misc]
    """LLaDA2 with its head: ``model(input_ids, attention_mask=None, position_ids=None).logits`` is [N, L, V].

    ``generate`` decodes in blocks, as the student does. No mask means bidirectional, a mask is taken as given (None,
    [N, L] padding, [N, 1, Q, K] bool or additive, BlockMask).
    """

    config_class = LLaDA2Config
    base_model_prefix = "model"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        self.model = LLaDA2Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BlockCache | None = None,
    ) -> Tensor:
        """Normed hidden states [N, L, H]; ``past_key_values`` is attended to and appended to."""
        mask = attention_mask_for(attention_mask, self.head_weight.dtype)
        return self.model(input_ids, mask, position_ids, past_key_values)

    def forward(
        self, input_ids: Tensor, attention_mask: Mask | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        return MaskedLMOutput(logits=self.lm_head(self.backbone(input_ids, attention_mask, position_ids)))

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights: matrices N(0, initializer_range), norms 1, router bias 0."""
        for parameter in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range)
        if isinstance(module, Router):
            module.expert_bias.zero_()
