"""What all students are: a transformers decoder with arbitrary attention masks and a masked-token head.

Used for training and, with a family's own file (``a2d_qwen3.py``, ``a2d_llama.py``), ``generation_a2d.py`` and
``decoding_a2d.py``, shipped inside releases (``trust_remote_code=True``), so it may import torch and transformers only,
and must run under transformers 4.57 as well as 5.x. The weights, their names and the arithmetic are transformers' own;
what differs is attention: no mask means bidirectional, and a mask is taken as given.

Shapes: B batch, Q queries, K keys, L length, H hidden size, V vocabulary, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.utils import ModelOutput

from .decoding_a2d import BlockCache

ATTENTION = f"a2d_{__name__.replace('.', '_')}"  # a release in the same process has its own
CACHE = "a2d_cache"  # the argument of a layer that reaches attention in every version of transformers

GRAPHS = 64  # of one function: torch's limit of 8 is fewer than models, head layouts, batch of one or more, ...

Mask = Tensor | BlockMask


def attention_mask_for(mask: Mask | None, dtype: torch.dtype) -> Mask | None:
    """The mask in the form that :func:`attend` takes.

    ``mask``: None (attend everywhere), a BlockMask, a [B, K] padding mask (nonzero = a real token), or [B or 1, 1, Q,
    K], bool (True = attend) or additive. ValueError for anything else.
    """
    if mask is None or isinstance(mask, BlockMask):
        return mask
    if mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if mask.dim() == 4 and mask.dtype == torch.bool:
        if mask.device.type != "cpu":
            return mask
        # Otherwise the CPU kernel converts the mask in every layer, and keeps each copy for the backward pass.
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    if mask.dim() == 4 and mask.is_floating_point():
        return mask.to(dtype)
    raise ValueError(
        f"attention_mask has shape {list(mask.shape)} and type {mask.dtype}: use a [B, L] padding mask, "
        "or [B, 1, Q, K] of bool (True = attend) or of floats to add"
    )


@functools.cache
def _flex(device_type: str) -> Any:
    # Uncompiled, flex_attention builds the full [Q, K] score matrix; use it on CPU only for checks.
    if device_type == "cpu":
        return flex_attention
    refuse_uncompiled()
    return torch.compile(flex_attention, dynamic=True)


def refuse_uncompiled() -> None:
    """Make torch.compile fail past its limit of graphs, which it raises: by default it goes on uncompiled there, with a
    warning, and attention takes the full [Q, K] matrix.
    """
    limits = {"recompile_limit": GRAPHS, "fail_on_recompile_limit_hit": True}
    old_names = {"cache_size_limit": GRAPHS, "fail_on_cache_limit_hit": True}  # before torch 2.6
    dynamo = torch._dynamo.config
    for name, value in (limits if hasattr(dynamo, "recompile_limit") else old_names).items():
        if hasattr(dynamo, name):
            setattr(dynamo, name, value)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scale: float) -> Tensor:
    """Attention with grouped heads: query [B, heads, Q, D], key and value [B, kv heads, K, D] -> [B, heads, Q, D].

    ``mask`` as :func:`attention_mask_for` returns it.
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        # Inside a compiled layer it is a part of that layer's graph.
        flex = flex_attention if torch.compiler.is_compiling() else _flex(query.device.type)
        return flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    if grouped and mask is not None and query.device.type != "cpu":
        return grouped_attention(query, key, value, mask, scale)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """:func:`attend` with a mask, for kernels that do not know grouped heads: no fused CUDA kernel takes both at once.

    The queries of a group are more queries of its one head: no key or value is copied.
    """
    share = query.shape[1] // key.shape[1]
    folded = query.unflatten(1, (-1, share)).flatten(2, 3)
    mixed = scaled_dot_product_attention(folded, key, value, attn_mask=mask.repeat(1, 1, share, 1), scale=scale)
    return mixed.unflatten(2, (share, -1)).flatten(1, 2)


def attention_interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if (cache := kwargs.get(CACHE)) is not None:
        key, value = cache.update(key, value, module.layer_idx)
    output = attend(query, key, value, attention_mask, kwargs["scaling"])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_interface)


def rope_for_every_version(values: dict[str, Any]) -> None:
    """Add to keyword arguments of a config, in place, the two names that transformers 4 reads RoPE by; 5 reads
    ``rope_parameters``, and a configuration must mean the same in both.
    """
    rope = values.get("rope_parameters")
    if rope is not None:
        values.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            values.setdefault("rope_scaling", rope)


@dataclass
class BlockDiffusionOutput(ModelOutput):  # type: ignore[misc]
    """``logits`` [B, L, V] of the token AT each position; ``hidden_states``: a tuple [B, L, H] of the embeddings and
    each layer's output, the last one normed; ``loss`` is None. ``cache`` is also called ``past_key_values``, as in
    transformers before 5.24.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Any:
        """``cache``."""
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if key == "past_key_values" else key)


def _refuse_others(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name == "labels" and value is not None:
            raise ValueError(
                "forward: labels give no loss here: the denoising loss is the cross entropy of masked tokens over t, "
                "under noise and a mask that training draws; compute it from logits"
            )
        if value is not None and value is not False:
            raise ValueError(f"forward: {name} is not supported; leave it out")


def _refuse_cache(cache: Any, mask: Mask | None) -> None:
    """ValueError for what is no cache, and for one of fixed size whose empty places attention would take for text."""
    if not hasattr(cache, "get_seq_length") or (mask is None and getattr(cache, "is_compileable", False)):
        raise ValueError(f"forward: past_key_values is a {type(cache).__name__}; pass a DynamicCache()")


class WithHead:
    """A base class of all models here."""

    lm_head: Any

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, [V, H]."""
        return self.lm_head.weight


class BlockDiffusionBackbone(WithHead):
    """First base class of a student, before ``BlockGenerationMixin`` and a ``PreTrainedModel`` of transformers: its
    decoder with the given attention mask, and logits for the token AT each position (no shift).

    ``model(input_ids, attention_mask=None, position_ids=None).logits`` is [B, L, V]. Training never calls that: it
    takes hidden states from :meth:`backbone` and scores the rows it needs against :attr:`head_weight`.
    """

    decoder_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise ValueError(
                "sliding-window attention is not supported: set use_sliding_window to false in config.json"
            )
        config._attn_implementation = ATTENTION
        self.model = self.decoder_class(config)
        # Padding has the same id as end-of-text, which is trained like any other token.
        self.model.embed_tokens.padding_idx = None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BlockCache | Cache | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Normed hidden states [B, L, H]; ``past_key_values`` is attended to and appended to. ``states``: takes the
        embeddings and every layer's output, the last one normed.

        What transformers' own forward does, without its names for a cache, which change between versions: the cache
        goes to :func:`attention_interface`.
        """
        # Whatever was chosen since: others ignore the cache, and take a mask of bool for numbers to add.
        if self.config._attn_implementation != ATTENTION:  # type: ignore[attr-defined]
            self.config._attn_implementation = ATTENTION  # type: ignore[attr-defined]
        hidden, cache = self.model.embed_tokens(input_ids), past_key_values
        mask = attention_mask_for(attention_mask, hidden.dtype)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        rotations = self.model.rotary_emb(hidden, position_ids)
        more = {} if cache is None else {CACHE: cache}
        for layer in self.model.layers:
            if states is not None:
                states.append(hidden)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotations, **more)
        hidden = self.model.norm(hidden)
        if states is not None:
            states.append(hidden)
        return hidden

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BlockCache | Cache | None = None,
        *,
        cache: BlockCache | Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> BlockDiffusionOutput | tuple[Any, ...]:
        """Logits [B, L, V]; ``attention_mask`` as :func:`attention_mask_for` takes it, ``position_ids`` [B or 1, L].

        ``past_key_values`` (or ``cache``, its name since transformers 5.24) is attended to and appended to, and
        returned unless ``use_cache`` is False; without one, ``use_cache`` True makes one. ``output_hidden_states`` and
        ``return_dict`` None: as the config says. ValueError for an argument that would be without effect.
        """
        _refuse_others(others)
        if input_ids is None:
            raise ValueError("forward: pass input_ids as a [batch, length] tensor")
        config = self.config  # type: ignore[attr-defined]
        if output_hidden_states is None:
            output_hidden_states = getattr(config, "output_hidden_states", False)
        if return_dict is None:
            return_dict = getattr(config, "return_dict", True)
        past_key_values = cache if past_key_values is None else past_key_values
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        if past_key_values is not None:
            _refuse_cache(past_key_values, attention_mask)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.backbone(input_ids, attention_mask, position_ids, past_key_values, states)
        output = BlockDiffusionOutput(
            logits=self.lm_head(hidden),
            cache=None if use_cache is False else past_key_values,
            hidden_states=None if states is None else tuple(states),
        )
        return output.to_tuple() if return_dict is False else output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast to bf16 must not reach the rotary frequencies: rounded, they would move every position, and differ from
        # those of the same weights loaded afresh.
        rotary = self.model.rotary_emb
        exact = dict(rotary.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, buffer in rotary.named_buffers():
            if buffer.dtype != exact[name].dtype:
                setattr(rotary, name, exact[name].to(buffer.device))
        return self
