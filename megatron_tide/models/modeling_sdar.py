"""The Qwen3-shaped student under the name that serving engines load block diffusion models by: SDAR.

The weights, their names and the arithmetic are those of ``a2d_qwen3.py``. A release contains this file, so it may
import torch and transformers only; and it imports every other file that the release needs itself, because transformers
4 copies only direct imports of this file.
"""

from __future__ import annotations

from typing import Any

from .a2d_qwen3 import A2DQwen3Config, A2DQwen3LMHeadModel
from .backbone_a2d import BlockDiffusionBackbone  # noqa: F401
from .decoding_a2d import BlockDecoder  # noqa: F401
from .generation_a2d import BlockGenerationMixin  # noqa: F401
from .sampling_a2d import DecodingRule  # noqa: F401


class SDARConfig(A2DQwen3Config):
    """The student's configuration; ``rope_theta`` is a plain attribute in every version of transformers."""

    model_type = "sdar"

    def __init__(self, rope_theta: float = 1e6, **kwargs: Any) -> None:
        rope = kwargs.get("rope_parameters") or {}
        theta = rope.get("rope_theta", rope_theta)
        super().__init__(rope_theta=theta, **kwargs)
        self.rope_theta = theta


class SDARForCausalLM(A2DQwen3LMHeadModel):
    """The student with the given attention mask, and logits for the token AT each position (no shift)."""

    config_class = SDARConfig  # type: ignore[assignment]
