"""The Llama-shaped student: Llama (no norm of queries and keys) as a block diffusion model (``backbone_a2d.py``).

A release contains this file, so it may import torch and transformers only; and it imports every other file that the
release needs itself, because transformers 4 copies only direct imports of this file.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from .backbone_a2d import BlockDiffusionBackbone, rope_for_every_version
from .decoding_a2d import BlockDecoder  # noqa: F401
from .generation_a2d import BlockGenerationMixin
from .sampling_a2d import DecodingRule  # noqa: F401


class A2DLlamaConfig(LlamaConfig):
    """Llama's configuration plus ``block_size`` (tokens denoised together) and ``mask_token_id`` (None if unknown)."""

    model_type = "a2d-llama"

    def __init__(self, block_size: int = 32, mask_token_id: int | None = None, **kwargs: Any) -> None:
        rope_for_every_version(kwargs)
        super().__init__(**kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id


class A2DLlamaLMHeadModel(BlockDiffusionBackbone, BlockGenerationMixin, LlamaPreTrainedModel):  # type: ignore[misc]
    """Llama with the given attention mask, and logits for the token AT each position (no shift)."""

    config_class = A2DLlamaConfig
    decoder_class = LlamaModel
    # transformers expects a list here in version 4 and a dict in version 5; its own model of the same shape has
    # it right.
    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys
