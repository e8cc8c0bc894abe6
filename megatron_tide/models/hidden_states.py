"""Hidden states at the scored positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_tide.diffusion.attention import TILE

if TYPE_CHECKING:
    from megatron_tide.diffusion import ModelInput


def masked_hidden_states(model: Any, inputs: ModelInput) -> Tensor:
    """The rows ``inputs.rows`` of the model's normed hidden states, one each, in their order; differentiable.

    ``inputs``: ids and positions [N, L], an attention mask, and flat indices into N * L. Attention is a bool
    mask on CPU (whose flex_attention has no backward pass) and a FlexAttention block mask on CUDA, of full tiles.
    """
    if inputs.input_ids.is_cuda:
        inputs = inputs.padded(TILE)
    attention = inputs.attention
    mask = attention.flex() if inputs.input_ids.is_cuda else attention.dense()
    hidden = model.backbone(inputs.input_ids, mask, inputs.position_ids)
    return hidden.flatten(0, 1).index_select(0, inputs.rows)


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile each decoder layer, its forward and its backward pass, when it first runs.

    All layers share one compiled graph; another length or batch makes a second one, for any. What leaves a layer is
    rounded as before; inside, fused operations keep fp32 where separate ones round to bf16. Layers with experts stay as
    they are: grouped matmuls are kernels already.
    """
    from megatron_tide.models.backbone_a2d import refuse_uncompiled  # imports transformers
    from megatron_tide.models.families import family_of

    layout = family_of(model).layout
    refuse_uncompiled()
    if not layout.joint_mlp:
        for layer in model.get_submodule(layout.layers):
            layer.compile(backend=backend)


def recompute_layers(model: Any) -> None:
    """Keep one hidden state per layer for the backward pass and recompute the rest (activation checkpointing)."""
    # The first name is transformers 5's, which warns about the second, which is transformers 4's.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
