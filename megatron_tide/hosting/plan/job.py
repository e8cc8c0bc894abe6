"""What a run asks of a machine, in numbers: models, lengths, precision; and bytes that a position takes in a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from megatron_tide.hosting.plan.ledger import LARGEST_PIECE
from megatron_tide.models.checkpoint_keys import module_tensors
from megatron_tide.models.families import ConfigSource
from megatron_tide.models.layer_specs import LayerSpec, LayerSpecs, layer_specs_of

FP32 = 4  # bytes


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer: hidden, queries, keys (all heads together), dense feed-forward, experts a token goes to."""

    hidden: int
    query: int
    key: int
    dense: int
    experts: int = 0
    expert: int = 0

    def saved(self, size: int) -> int:
        """Bytes that a position leaves behind for the backward pass, in numbers of ``size`` bytes.

        Each norm: its input in fp32 (a copy, or the input itself), the normed and the scaled rows. Attention: queries
        and keys normed as well and turned, values, its output before and after heads are joined. Feed-forward: gate,
        its silu, up, their product. Experts: that for each, the routed rows, and the outputs in fp32.
        """
        norm = FP32 + 2 * size
        attention = (FP32 + 4 * size) * self.query + (FP32 + 3 * size) * self.key
        routed = self.experts * (4 * size * self.expert + (size + FP32) * self.hidden)
        return 2 * norm * self.hidden + attention + 4 * size * self.dense + routed

    def working(self, size: int) -> int:
        """Bytes that a position takes at the fullest moment of a forward without graph, its hidden state apart."""
        mixing = 2 * self.hidden + 3 * (self.query + 2 * self.key) + 2 * self.query
        feeding = 3 * self.hidden + 3 * self.dense + self.experts * (2 * self.hidden + 3 * self.expert)
        return size * max(mixing, feeding) + 2 * FP32 * self.hidden

    def largest(self, size: int) -> int:
        """Bytes of a position in the largest tensor of the layer."""
        routed = self.experts * max(self.hidden, self.expert)
        return size * max(self.hidden, self.query, self.dense, routed)


class Model:
    """A model's shapes, on no memory."""

    def __init__(self, source: ConfigSource) -> None:
        self.sections: LayerSpecs = layer_specs_of(source)
        self.config: Any = self.sections.config
        self.tensors = [tensor.numel() for tensor in module_tensors(self.sections.model).values()]
        self.parameters = sum(self.tensors)
        self.vocab, self.hidden = self.config.vocab_size, self.config.hidden_size

    @cached_property
    def layers(self) -> list[Widths]:
        config = self.config
        query = config.num_attention_heads * config.head_dim
        plain = Widths(
            config.hidden_size, query, config.num_key_value_heads * config.head_dim, config.intermediate_size
        )
        if not hasattr(config, "num_experts"):
            return [plain] * config.num_hidden_layers
        expert = config.moe_intermediate_size
        mixture = replace(
            plain, dense=config.num_shared_experts * expert, experts=config.num_experts_per_tok, expert=expert
        )
        dense = config.first_k_dense_replace
        return [plain if number < dense else mixture for number in range(config.num_hidden_layers)]

    @property
    def has_experts(self) -> bool:
        return any(layer.experts for layer in self.layers)

    def small(self, size: int) -> int:
        """Bytes of all tensors that a heap keeps when they are freed, in numbers of ``size`` bytes."""
        return size * sum(numel for numel in self.tensors if numel * size < LARGEST_PIECE)

    @property
    def active(self) -> float:
        """Parameters that one position is multiplied with in its layers: of the experts, the chosen ones."""
        config = self.config
        share = config.num_experts_per_tok / config.num_experts if hasattr(config, "num_experts") else 1.0
        return sum(_numbers(layer, ".experts.", share) for layer in self.sections.layers)


def _numbers(section: LayerSpec, routed: str, share: float) -> float:
    return sum(t.numel() * (share if routed in f".{name}." else 1.0) for name, t in section.tensors.items())


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on ``ranks`` ranks. Lengths are those of the longest sample.

    ``student_length``, ``teacher_length``: positions of one input sequence; ``halves``: 2 with CompDemo, else 1;
    ``gold``, ``hidden``: what the objectives ask the teacher for; ``deepspeed``: the student's ds_configs file, read;
    ``steps``: how many are taken; ``checkpoints``: how many lie on disk at most. ``teacher`` None: denoising only.
    """

    student: Model
    teacher: Model | None
    ranks: int
    micro_batch_size: int
    accumulation: int
    student_tokens: int
    student_length: int
    teacher_tokens: int
    teacher_length: int
    halves: int
    gold: bool
    hidden: bool
    precision: torch.dtype
    teacher_dtype: torch.dtype
    recompute: bool
    deepspeed: dict[str, Any]
    steps: int
    checkpoints: int
    stored_bytes: int = 0  # of the teacher's largest checkpoint file; 0: not known

    @property
    def student_positions(self) -> int:
        """Positions in one forward of the student."""
        return self.micro_batch_size * self.student_length

    @property
    def teacher_sequences(self) -> int:
        return self.micro_batch_size * self.halves

    @property
    def teacher_positions(self) -> int:
        """Positions in one micro-batch of the teacher."""
        return self.teacher_sequences * self.teacher_length


def staircase_length(tokens: int, block: int) -> int:
    """Positions of [xt ; x0] for a sample whose prompt is shorter than a block: of x0, all blocks but the last."""
    return -(-tokens // block) * block + (tokens - 1) // block * block
