"""Autoregressive models: transformers' own causal decoders with what this project needs of every model.

Without a mask attention is causal, and ``generate`` is transformers'; a mask of four dimensions or a BlockMask is taken
as given, as in block diffusion models.

Shapes: B batch, L length, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import eager_mask

from megatron_tide.models.backbone_a2d import Mask, WithHead, attention_interface, attention_mask_for

ATTENTION = "tide_causal"

AttentionInterface.register(ATTENTION, attention_interface)
AttentionMaskInterface.register(ATTENTION, eager_mask)  # never None, which would mean that every token sees all others


class CausalBackbone(WithHead):
    """First base class of a transformers causal model: adds ``backbone``."""

    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        config._attn_implementation = ATTENTION

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Mask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Normed hidden states [B, L, H]; ``past_key_values`` is attended to and appended to."""
        mask = attention_mask
        if not (isinstance(mask, Tensor) and mask.dim() == 2):  # transformers makes a causal mask of a padding mask
            mask = attention_mask_for(mask, self.head_weight.dtype)
        return self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state


class Qwen3ForCausalLM(CausalBackbone, transformers.Qwen3ForCausalLM):
    """Qwen3 as published: each row predicts the next token."""


class LlamaForCausalLM(CausalBackbone, transformers.LlamaForCausalLM):
    """Llama as published: each row predicts the next token."""
