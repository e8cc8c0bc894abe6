"""A tiny student with a tokenizer, as a release has them, for GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.models import tiny_student_config, write_hub_folder
from tests.support.tokenizers import TEXTS, train_byte_bpe


def gguf_release(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """320 ids, some of them unused; the rows of every matrix are a multiple of 32 values."""
    train_byte_bpe(folder, TEXTS, 310)
    spec = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    roles = {"eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>", "mask_token_id": "<|mask|>"}
    shape = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96}
    config = {**shape, **{role: ids[token] for role, token in roles.items()}, **changes}
    return write_hub_folder(folder, tiny_student_config(**config), dtype=dtype)
