"""Training weights -> a folder in hub format, one tensor in memory at a time (a shard while it is written)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megatron_tide.models
from megatron_tide.bridge import TextTokenizer
from megatron_tide.files import read_json, write_json
from megatron_tide.models import meta_model
from megatron_tide.models.checkpoint_keys import Slot, checkpoint_table, module_tensors
from megatron_tide.models.families import ReleaseFiles, config_dict, family_of
from megatron_tide.models.shards import ShardedFolder, write_shards
from megatron_tide.training_checkpoint import TrainingCheckpoint

MODELS = Path(megatron_tide.models.__file__).parent
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """``"5GB"``, ``"500MiB"`` or a number of bytes -> bytes. ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: give a size such as 5GB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Generation:
    """The ids that generating needs, and the block size the model was trained with."""

    block_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int


def generation_of(trained: TrainingCheckpoint, tokenizer: TextTokenizer) -> Generation:
    """From the data the model was trained on, which the trainer recorded; the ids must be the tokenizer's.

    Raises:
        ValueError: when they are not: the starting folder holds another tokenizer than the run used.
    """
    side = trained.run["data"]["student"]
    if side["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{trained.base_model}: its tokenizer is not the one of {trained.folder}; name the right --base-model"
        )
    return Generation(
        block_size=side["block"],
        mask_token_id=side["mask_id"],
        eos_token_id=side["eos_id"],
        pad_token_id=side["pad_id"],
    )


def export(
    trained: TrainingCheckpoint,
    tokenizer: TextTokenizer,
    files: ReleaseFiles,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write weights, config, generation config, tokenizer and code into the empty folder ``out``."""
    model = meta_model(trained.base_model, as_student=True)
    write_shards(out, _tensors(model, trained, dtype), max_shard_bytes)
    knobs = generation_of(trained, tokenizer)
    config: dict[str, Any] = config_dict(model, dtype) | vars(knobs)
    if files.auto_map:
        config["auto_map"] = files.auto_map
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {**vars(knobs), "do_sample": False})
    tokenizer.save(out)
    _name_tokenizer_class(out / "tokenizer_config.json")
    for name in files.code:
        shutil.copyfile(MODELS / name, out / name)
    for file in out.glob("*.safetensors"):  # written readable by their owner alone
        file.chmod((out / "config.json").stat().st_mode)


def _name_tokenizer_class(path: Path) -> None:
    """transformers 5 writes a class name that 4 does not know; both know the old one. All else stays as it is."""
    if path.is_file():
        config = read_json(path)
        if config.get("tokenizer_class") == "TokenizersBackend":
            write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _tensors(
    model: torch.nn.Module, trained: TrainingCheckpoint, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """(public key, tensor in the release's precision); what was never trained comes from the starting folder."""
    shapes = module_tensors(model)
    stored, start = trained.names(), ShardedFolder(trained.base_model)
    unknown = sorted(stored - set(shapes))
    if unknown:
        raise ValueError(
            f"{trained.folder}: holds {unknown[0]}, which {trained.base_model}/config.json does not describe"
        )
    held: tuple[str, torch.Tensor] | None = None  # a layer's stacked experts are read once for all their keys
    for key, slot in checkpoint_table(shapes, family_of(model)).items():
        if slot.name not in stored:
            yield key, _untrained(start, key, slot)
            continue
        if held is None or held[0] != slot.name:
            held = (slot.name, trained.tensor(slot.name).to(dtype))
            if held[1].shape != shapes[slot.name].shape:
                raise ValueError(
                    f"{trained.folder}: {slot.name} has shape {list(held[1].shape)}, {trained.base_model}/config.json "
                    f"makes it {list(shapes[slot.name].shape)}; name the right folder with --base-model"
                )
        yield key, slot.of({slot.name: held[1]})


def _untrained(start: ShardedFolder, key: str, slot: Slot) -> torch.Tensor:
    if key not in start.keys:
        raise ValueError(f"{start.folder}: lacks {key}, which the checkpoint does not hold either")
    ((_, tensor),) = start.tensors([key])
    return tensor
