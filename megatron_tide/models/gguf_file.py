"""A GGUF file of a Llama-shaped model -> a folder in hub format, fp32, with its tokenizer and chat template.

transformers reads the file, with the packages of requirements-real.txt; nothing in it is code.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_tide.gguf_header import check_lists
from megatron_tide.models.families import parameter_count

PARAMETERS_PER_BYTE = 8  # the smallest quantization takes more than one bit for each


def gguf_to_folder(file: Path, folder: Path) -> None:
    """Write the model of a ``.gguf`` file into an empty folder.

    Raises:
        ValueError: no such file, one that cannot be read, not Llama's shape, or tensors that are missing.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{file}: needs {' and '.join(missing)}; pip install -r requirements-real.txt")
    try:
        check_lists(file)
    except ValueError as error:
        raise _unreadable(file, ValueError(str(error).removeprefix(f"{file}: "))) from None
    with tempfile.TemporaryDirectory(prefix="tide-gguf-") as alone:  # transformers reads what lies beside it, too
        Path(alone, "model.gguf").symlink_to(file.resolve())
        _write(file, alone, folder)


def _write(file: Path, alone: str, folder: Path) -> None:
    """``alone``: a folder with the file as ``model.gguf``, and nothing else."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    place: dict[str, Any] = {"pretrained_model_name_or_path": alone, "gguf_file": "model.gguf"}
    place |= {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(**place)
    except Exception as error:
        raise _unreadable(file, error) from None
    if config.model_type != "llama":
        raise ValueError(f"{file}: holds a {config.model_type} model; only Llama's shape is supported")
    if parameter_count(config.to_dict()) > PARAMETERS_PER_BYTE * file.stat().st_size:  # before memory is taken for them
        raise ValueError(f"{file}: too small for the shapes it states; download it again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        read: Any = LlamaForCausalLM.from_pretrained
        model, loaded = read(**place, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise _unreadable(file, error) from None
    if wrong := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in loaded[kind]):
        raise ValueError(f"{file}: {wrong[0]} is missing or has another shape; download it again")
    model.hf_quantizer = None  # otherwise transformers refuses to save what it has dequantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unreadable(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{file}: cannot be read ({type(error).__name__}: {reason}); download it again")
