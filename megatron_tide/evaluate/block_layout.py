"""The bound with blocks that begin at the answer, as the published sampler lays them out.

Each sample is moved to the right by the slots that its first block is short of; they stay invisible, and no position
changes. The last block is filled with end of text, as in prepared data.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_tide.data.batch import Tokens
from megatron_tide.diffusion import ModelInput


def lead_of(tokens: Tokens, block: int) -> torch.Tensor:
    """int64 [B]: how many tokens the first block is short of, so that the response begins a block."""
    return -tokens.prompt % block


def moved(tokens: Tokens, block: int, eos_id: int) -> Tokens:
    """``tokens`` behind the slots of ``lead_of``."""
    samples, width = tokens.ids.shape
    lead_B = lead_of(tokens, block)
    last_B1 = (tokens.length - 1).unsqueeze(1)
    ends_B = tokens.ids.gather(1, last_B1).squeeze(1) == eos_id  # a truncated response is not filled
    length_B = torch.where(ends_B, -(-(lead_B + tokens.length) // block) * block, lead_B + tokens.length)
    place_BS = torch.arange(width + 2 * block).expand(samples, -1)
    source_BS = (place_BS - lead_B.unsqueeze(1)).clamp(min=0).minimum(last_B1)
    in_text_BS = (place_BS >= lead_B.unsqueeze(1)) & (place_BS < length_B.unsqueeze(1))
    return Tokens(
        ids=tokens.ids.gather(1, source_BS),
        chunk=tokens.chunk.gather(1, source_BS).where(in_text_BS, -1),
        length=length_B,
        prompt=tokens.prompt + lead_B,
        content_end=tokens.content_end + lead_B,
    )


def without_lead(inputs: ModelInput, lead_B: torch.Tensor) -> ModelInput:
    """``inputs`` of moved tokens with every token at its own position, and the slots before them invisible."""
    position_BL = inputs.position_ids - lead_B.unsqueeze(1)
    valid_BL = inputs.attention.valid & (position_BL >= 0)
    return replace(inputs, position_ids=position_BL.clamp(min=0), attention=replace(inputs.attention, valid=valid_BL))
