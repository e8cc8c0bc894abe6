"""Causal language models of transformers, for what they write themselves: baselines, and text to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_tide.models.load import resolve_folder


def load_autoregressive(path: str | Path, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, Path]:
    """Any causal language model of transformers -> (the model, its local folder). No code of the folder is run.

    Raises:
        ValueError: no model there, or its tensors are not those that config.json describes.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a causal language model ({reason})") from None
    model, found = loaded
    wrong = sorted(str(name) for names in found.values() for name in names)
    if wrong:  # transformers fills in what is missing with random numbers
        raise ValueError(f"{path}: its tensors are not those of the model that config.json describes ({wrong[0]}, ...)")
    return model.to(device).eval(), folder


def end_tokens(model: Any, eos_id: int) -> list[int]:
    """The ids that end an answer: those of the tokenizer, of config.json and of generation_config.json."""
    named = [model.config.eos_token_id, model.generation_config.eos_token_id, eos_id]
    return sorted({index for ids in named if ids is not None for index in (ids if isinstance(ids, list) else [ids])})
