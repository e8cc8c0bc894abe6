"""Checkpoint -> text: block decoding with an exact KV cache, and prompts around it.

The sampler itself is ``megatron_tide.models.decoding_a2d`` and ``sampling_a2d``, shared with every release.
"""

from megatron_tide.generate.answer_file import AnswerFile
from megatron_tide.generate.complete import BLOCKS, Completion, complete, prompt_ids, stream
from megatron_tide.generate.in_order import IN_ORDER
from megatron_tide.generate.opened import open_writer
from megatron_tide.generate.prompts import (
    Prompt,
    from_prepared,
    from_text,
    print_answer,
    read_prompts,
    tell_changes,
    with_holes,
)
from megatron_tide.generate.terminal import chat
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.generation_a2d import decoding_rule
from megatron_tide.models.sampling_a2d import DecodingRule

__all__ = [
    "BLOCKS",
    "IN_ORDER",
    "AnswerFile",
    "BlockDecoder",
    "Completion",
    "DecodingRule",
    "Prompt",
    "chat",
    "complete",
    "decoding_rule",
    "from_prepared",
    "from_text",
    "open_writer",
    "print_answer",
    "prompt_ids",
    "read_prompts",
    "stream",
    "tell_changes",
    "with_holes",
]
