"""Checkpoint -> text: block decoding with an exact KV cache, and prompts around it.

The sampler itself is ``megatron_tide.models.decoding_a2d`` and ``sampling_a2d``, shared with every release.
"""

from megatron_tide.generate.complete import Completion, complete, prompt_ids, stream
from megatron_tide.generate.prompts import (
    Prompt,
    from_prepared,
    from_text,
    print_answers,
    read_prompts,
    with_holes,
    write_answers,
)
from megatron_tide.generate.terminal import chat
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.generation_a2d import decoding_rule
from megatron_tide.models.sampling_a2d import DecodingRule

__all__ = [
    "BlockDecoder",
    "Completion",
    "DecodingRule",
    "Prompt",
    "chat",
    "complete",
    "decoding_rule",
    "from_prepared",
    "from_text",
    "print_answers",
    "prompt_ids",
    "read_prompts",
    "stream",
    "with_holes",
    "write_answers",
]
