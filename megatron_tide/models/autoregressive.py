"""Causal language models of transformers, for what they write themselves: baselines, and text to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_tide.bounds import CONFIG, check_config
from megatron_tide.files import check_form, check_regular, read_json
from megatron_tide.models.load import resolve_folder
from megatron_tide.models.shards import ShardedFolder

_NUMBERS: tuple[str, ...] = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_beams",
)
_NUMBERS += ("max_length", "min_length", "max_new_tokens", "min_new_tokens", "num_beam_groups", "num_return_sequences")
_NUMBERS += ("repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "guidance_scale")
_NUMBERS += ("encoder_repetition_penalty", "penalty_alpha", "max_time", "prompt_lookup_num_tokens")  # of generation


def load_autoregressive(path: str | Path, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, Path]:
    """Any causal language model of transformers -> (the model, its local folder). No code of the folder is run, nothing
    is unpickled, and nothing is read that is not in the folder.

    Raises:
        ValueError: no model there, or its tensors are not those that config.json describes.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(path)
    _check(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a configuration that describes no model causes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: cannot be read as a causal language model ({reason})") from None
    model, found = loaded
    wrong = sorted(str(name) for names in found.values() for name in names)
    if wrong:  # transformers fills in what is missing with random numbers
        raise ValueError(f"{path}: its tensors are not those of the model that config.json describes ({wrong[0]}, ...)")
    return model.to(device).eval(), folder


def _check(folder: Path) -> None:
    """ValueError for what transformers would read elsewhere, wait for, or build for hours."""
    check_regular(folder)
    ShardedFolder(folder)  # safetensors, all in this folder
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds an adapter, which names another model; merge it into its model first")
    path, stated = folder / "config.json", folder / "generation_config.json"
    config = read_json(path)
    own = read_json(stated) if stated.exists() else {}
    check_form(
        {key: own[key] for key in _NUMBERS if key in own}, {str: (None, float)}, f"{stated}:", "; restore the file"
    )
    for file, values in ((path, config), (stated, own)):
        try:
            check_config({"eos_token_id": values.get("eos_token_id")})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    for key, value in [pair for part in (config, *config.values()) if isinstance(part, dict) for pair in part.items()]:
        if "layer" in key and type(value) is int and value > CONFIG["num_hidden_layers"]:
            raise ValueError(f"{path}: {key[:40]} is {str(value)[:20]}, more than any model has; restore the file")
        if key.endswith("attn_implementation") and "/" in str(value):  # code for GPUs, from the hub
            raise ValueError(f"{path}: {key[:40]} {str(value)[:60]!r} names code of the hub; remove that line")


def most_rows(model: Any, batch_size: int) -> int:
    """``batch_size``, but 1 for a model with a recurrent state that the padding of shorter prompts enters: some hide it
    there, others (RWKV) do not read their attention mask.
    """
    from transformers import GenerationConfig

    if batch_size == 1 or not getattr(model, "_is_stateful", False):
        return batch_size
    ids, before, rows = (
        torch.arange(1, 5, device=model.device),
        torch.ones(8, dtype=torch.int64, device=model.device),
        [],
    )
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for pads in (before[:0], before):
        mask = torch.cat((0 * pads, torch.ones_like(ids)))[None]
        rule = GenerationConfig(pad_token_id=1, **how)
        found = model.generate(torch.cat((pads, ids))[None], attention_mask=mask, generation_config=rule)
        rows.append(found.logits[0][0].float())
    return batch_size if (rows[0] - rows[1]).abs().max() < 0.1 * rows[0].std() else 1


def end_tokens(model: Any, eos_id: int) -> list[int]:
    """The ids that end an answer: those of the tokenizer, of config.json and of generation_config.json."""
    named = [model.config.eos_token_id, model.generation_config.eos_token_id, eos_id]
    return sorted({index for ids in named if ids is not None for index in (ids if isinstance(ids, list) else [ids])})


def only_numbers(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor of transformers: ``scores``, ValueError where some are not numbers, of which it would take the
    first token."""
    if bool(scores.isnan().any()):
        raise ValueError("generate: the model's outputs are not numbers; its weights or precision are broken")
    return scores
