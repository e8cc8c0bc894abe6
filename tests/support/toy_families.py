"""Two families from outside the package, each one module and one row: a Llama-shaped causal model, and a Qwen3-shaped
block diffusion model of another model type, as SDAR is.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from megatron_tide.models.a2d_qwen3 import A2DQwen3Config, A2DQwen3LMHeadModel
from megatron_tide.models.causal import CausalBackbone
from megatron_tide.models.families import Family, HubConfig

SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
OTHERS = ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "pad_token_id")


class ToyCausalConfig(LlamaConfig):
    model_type = "toy-causal"


class ToyCausalLM(CausalBackbone, LlamaForCausalLM):
    """A Llama."""


class ToyBlockConfig(A2DQwen3Config):
    model_type = "toy-block"


class ToyBlockLM(A2DQwen3LMHeadModel):
    """A block diffusion model."""

    config_class = ToyBlockConfig


CAUSAL_CONFIG = HubConfig(config_class=ToyCausalConfig, required=SHAPES, optional=OTHERS)
BLOCK_CONFIG = HubConfig(
    config_class=ToyBlockConfig, required=SHAPES, optional=(*OTHERS, "block_size", "mask_token_id")
)
CAUSAL = Family(
    model_types=("toy-causal",),
    module=ToyCausalLM,
    config=CAUSAL_CONFIG,
    checkpoint_keys={r"model\.(.*)": r"transformer.\1"},
    generation="autoregressive",
    shifts_by_one=True,
)
BLOCK = Family(
    model_types=("toy-block",),
    module=ToyBlockLM,
    config=BLOCK_CONFIG,
)


def toy_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Two layers of 64 tokens."""
    return {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 1e4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "mask_token_id": 2,
        "block_size": 4,
        **changes,
    }
