"""A model with random weights, from shapes and a tokenizer."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_tide.bounds import shown
from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.files import AtomicFolder, read_json
from megatron_tide.lock import lock_beside
from megatron_tide.models.families import fresh_model
from megatron_tide.models.load import write_folder

VOCAB_MULTIPLE = 64
_WRITTEN = ["*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_WRITTEN += ["additional_chat_templates", *(f"*{word}*.json" for word in ("config", "index", "token", "vocab"))]


def complete_config(config: dict[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The config with the tokenizer's ids and a vocab_size that holds all of them."""
    needed = tokenizer.vocab_size
    size = config.get("vocab_size") or -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if type(size) is not int or size < needed:
        raise ValueError(
            f"the config's vocab_size {shown(size)} is smaller than the tokenizer's {needed}; remove it from the config"
        )
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {**config, **ids, "vocab_size": size}


def check_out(out: Path, fresh: bool) -> None:
    """ValueError unless ``out`` may become a new model: nothing is there, or a model and ``fresh``."""
    if out.exists() and any(out.iterdir()):
        if not (out / "config.json").exists():
            raise ValueError(f"{out}: exists and is not a model folder; use another --out")
        others = [one.name for one in out.iterdir() if not any(fnmatch(one.name, own) for own in _WRITTEN)]
        if others:
            raise ValueError(f"{out}: has {min(others)}, which this command does not write; use another --out")
        if not fresh:
            raise ValueError(f"{out}: already contains a model; pass --fresh to replace it")


def init_model(config: Path, tokenizer: str, seed: int, out: Path, fresh: bool, block_size: int | None = None) -> int:
    """Write the folder ``out``, complete or not at all; -> the number of parameters. ``block_size``: replaces the
    config's.

    Raises:
        ValueError: ``out`` holds something else, or the config is no model's.
    """
    check_out(out, fresh)
    loaded = load_tokenizer(tokenizer)
    block = {} if block_size is None else {"block_size": block_size}
    values = read_json(config)
    try:
        model = fresh_model(complete_config(values, loaded) | block, seed)
    except ValueError as error:
        raise ValueError(f"{config}: {str(error).removeprefix('config: ')}") from None
    with lock_beside(out), AtomicFolder(out) as draft:
        write_folder(model, draft)
        loaded.save(draft)
    return sum(parameter.numel() for parameter in model.parameters())
