"""What is at a path, and how it writes: a block diffusion model, a causal one, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.bridge.tokenizer import ROLES
from megatron_tide.generate.complete import BLOCKS, Writer
from megatron_tide.generate.in_order import IN_ORDER
from megatron_tide.machine import device_of
from megatron_tide.models.autoregressive import load_autoregressive
from megatron_tide.models.gguf_model import GgufModel
from megatron_tide.models.load import stated_layout
from megatron_tide.training_checkpoint import generation_of, open_model


def open_writer(path: str, dtype: torch.dtype, device: str) -> tuple[Writer, Any, TextTokenizer]:
    """(how it writes, the model, its tokenizer) of what ``open_model`` takes, any causal language model of
    transformers, or a GGUF file, which has its own ``dtype``. ``device``: as of a command's ``--device``; a GGUF file
    runs where llama.cpp was built for, unless it is "cpu".

    Raises:
        ValueError: no model there, or corrupt.
    """
    if path.endswith(".gguf"):
        return BLOCKS, *_open_gguf(Path(path), gpu=device != "cpu")
    device = device_of(device)
    if generation_of(path) == "autoregressive":
        model, folder = load_autoregressive(path, dtype, device)
        return IN_ORDER, model, load_tokenizer(folder)
    opened = open_model(path, dtype, device)
    opened.model.config.block_layout = stated_layout(opened.folder)
    return BLOCKS, opened.model, load_tokenizer(opened.folder)


def _open_gguf(file: Path, gpu: bool) -> tuple[GgufModel, TextTokenizer]:
    model, tokenizer = GgufModel(file, gpu=gpu), load_tokenizer(file)
    stated = [getattr(model.config, f"{role}_token_id") for role in ROLES]
    if tokenizer.vocab_size > model.config.vocab_size or stated != [tokenizer.describe()[f"{r}_id"] for r in ROLES]:
        raise ValueError(f"{file}: its tokenizer is not that of its model; write it again")
    return model, tokenizer
