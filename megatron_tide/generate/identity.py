"""What decides an answer besides its prompt and settings: the model in memory, its folder's files, and code."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron_tide
from megatron_tide.bridge import TextTokenizer
from megatron_tide.files import fingerprint, read_json, sha256_file
from megatron_tide.models import weights_sha256

CODE = ("bridge/*.py", "generate/*.py", "models/*.py")
PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece")


def identity(model: Any, folder: Path, tokenizer: TextTokenizer) -> list[Any]:
    """Class, weights and block size (as in memory) of a model, its config files, its tokenizer with ids by role, its
    template; of a GGUF file, which has all in one, its bytes and the version of what runs it.
    """
    files = [folder / name for name in ("config.json", "generation_config.json")]
    configs: list[Any] = [read_json(file) if file.is_file() else None for file in files]
    configs += [sha256_file(folder), model.llama.version] if folder.is_file() else []
    configs.append(getattr(model.config, "block_size", None))  # of a checkpoint, that of its data
    roles = {name: value for name, value in tokenizer.describe().items() if name != "name"}
    return [type(model).__name__, configs, roles, tokenizer.template_fingerprint, weights_sha256(model)]


def code(more: Sequence[str] = (), packages: Sequence[str] = ()) -> str:
    """sha256 hex of this project's code from prompt to answer, ``more`` files of it, and the versions of libraries."""
    package = Path(megatron_tide.__file__).parent
    files = sorted(file for pattern in (*CODE, *more) for file in package.glob(pattern))
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)}
    return fingerprint([versions, [(file.name, sha256_file(file)) for file in files]])
