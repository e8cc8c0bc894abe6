"""Models from folders in hub format, and back.

    model = load_model("runs/quickstart/teacher", torch.bfloat16)
    write_folder(model, "out", dtype=torch.bfloat16)

``config.json``'s ``model_type`` decides the class (:mod:`megatron_tide.models.families`). No code of a folder is ever
run, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tide.bounds import shown
from megatron_tide.cli import ONLY_TO_GENERATE
from megatron_tide.files import read_json, sha256_file, write_json
from megatron_tide.hub import check_hub_name, download
from megatron_tide.models.checkpoint_keys import Slot, checkpoint_table, module_tensors, tied_aliases
from megatron_tide.models.families import config_dict, family_of, meta_model
from megatron_tide.models.sampling_a2d import BLOCKS_AT_ANSWER
from megatron_tide.models.shards import MAX_SHARD_BYTES, ShardedFolder, write_shards

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # by the names of flags
# Weights, configuration and tokenizers; never code.
_FROM_HUB = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve_folder(path: str | Path) -> Path:
    """A local folder, unchanged; a hub name ("organisation/model") downloaded, or found in the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    name = str(path)
    if name.endswith(".gguf"):
        raise ValueError(f"{path}: {ONLY_TO_GENERATE}")
    check_hub_name(name)
    return download(name, _FROM_HUB, f"{name}: no such folder, and not found on the hub")


def stated_layout(folder: Path) -> str | None:
    """Where blocks begin by a folder's generation_config.json or config.json; None where they do not say."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        stated = read_json(file).get("block_layout") if file.is_file() else None
        if stated is not None and stated not in tuple(BLOCKS_AT_ANSWER):
            raise ValueError(f"{file}: block_layout is {shown(stated)}; use {' or '.join(BLOCKS_AT_ANSWER)}")
        if stated is not None:
            return str(stated)
    return None


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    as_student: bool = False,
) -> Any:
    """The model of a hub-format folder or hub name, of any family in :mod:`megatron_tide.models.families`.

    -> a module in ``eval`` mode with ``model(input_ids, attention_mask=None, position_ids=None).logits`` [B, L, V],
    ``.backbone(...)`` [B, L, H], ``.head_weight`` [V, H] and ``.config``; weights in ``dtype``, but a router's bias in
    the precision it is stored in. ``as_student``: as the block diffusion model that training makes from it. One shard
    is open at a time, and tensors go straight to ``device``. ValueError, one line, for a missing folder, an unknown
    type, or tensors that are missing, unexpected, of the wrong shape or unreadable.
    """
    folder = resolve_folder(path)
    model = meta_model(folder, as_student=as_student)
    _fill(model, ShardedFolder(folder), dtype, torch.device(device))
    # Rotary frequencies are computed, not stored: on meta they have no values.
    rotary = family_of(model).layout.rotary
    model.set_submodule(rotary, type(model.get_submodule(rotary))(model.config).to(device))
    return model.eval()


def write_folder(
    model: nn.Module, out: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a model as a folder in hub format, ``config.json`` last: what :func:`load_model` reads.

    ``dtype`` None keeps the model's own; a router's bias is never cast. Other files in ``out`` (a tokenizer's) are not
    changed. ValueError if ``out`` already contains a model, or cannot be written.
    """
    out = Path(out)
    if (out / "config.json").exists() or any(out.glob("*.safetensors")):
        raise ValueError(f"{out}: already contains a model; use another folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    tensors, family = module_tensors(model), family_of(model)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for key, slot in checkpoint_table(tensors, family).items():
            tensor = slot.of(tensors)
            yield key, tensor if dtype is None or family.keeps_precision(slot.name) else tensor.to(dtype)

    write_shards(out, pairs(), max_shard_bytes)
    write_json(out / "config.json", config_dict(model, dtype or next(model.parameters()).dtype))


def weights_sha256(model: nn.Module) -> str:
    """sha256 in hex of names, types, shapes and values of all weights, as they are in memory; of a GGUF file's model,
    that of the file.
    """
    if isinstance(file := getattr(model, "file", None), Path):
        return sha256_file(file)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _fill(model: nn.Module, source: ShardedFolder, dtype: torch.dtype, device: torch.device) -> None:
    """Give every tensor of a meta-device model its memory and its stored value."""
    shapes, family, aliases = module_tensors(model), family_of(model), tied_aliases(model)
    table = checked_table(source, model)
    ready: dict[str, Tensor] = {}
    for key, stored in source.tensors(table):
        slot = table[key]
        if slot.index is None:
            # Always copied: trainable weights must not be backed by a memory-mapped file.
            kept = stored.dtype if family.keeps_precision(slot.name) else dtype
            ready[slot.name] = stored.to(device, kept, copy=True)
            continue
        if slot.name not in ready:
            ready[slot.name] = torch.empty(shapes[slot.name].shape, dtype=dtype, device=device)
        ready[slot.name][slot.index].copy_(stored)
    _check_copies(source, aliases, ready, dtype)
    _adopt(model, ready, aliases)


def checked_table(source: ShardedFolder, model: nn.Module) -> dict[str, Slot]:
    """The checkpoint table of a module, all of whose tensors a folder has, of its shapes, and no others (but equal
    copies of tied ones); only headers are read. ValueError where it has not.
    """
    tensors = module_tensors(model)
    table = checkpoint_table(tensors, family_of(model))
    problems = []
    for word, keys in (
        ("lacks", table.keys() - source.keys),
        ("has unexpected", source.keys - table.keys() - tied_aliases(model).keys()),
    ):
        if keys:
            some = ", ".join(heapq.nsmallest(3, keys)) + (", ..." if len(keys) > 3 else "")
            problems.append(f"{word} {len(keys)} tensor(s) ({some})")
    if problems:
        found = " and ".join(problems)
        raise ValueError(f"{source.folder}: the checkpoint {found}: it does not match its config.json")
    for key, (shape, dtype) in source.headers(table):
        expected = list(table[key].of(tensors).shape)
        if shape != expected:
            raise ValueError(f"{source.folder}: {key} has shape {shape}, config.json gives {expected}")
        if not dtype.startswith(("F", "BF")):
            raise ValueError(f"{source.folder}: {key} holds {dtype}, not floating-point numbers; use other weights")
    return table


def _check_copies(source: ShardedFolder, aliases: dict[str, str], ready: dict[str, Tensor], dtype: torch.dtype) -> None:
    for key, copy in source.tensors(key for key in aliases if key in source.keys):
        original = ready[aliases[key]]
        if not torch.equal(copy.to(original.device, dtype), original):
            raise ValueError(f"{source.folder}: {key} differs from {aliases[key]}, but config.json ties them")


def _adopt(model: nn.Module, ready: dict[str, Tensor], aliases: dict[str, str]) -> None:
    parameters = dict(model.named_parameters())
    made = {name: nn.Parameter(tensor) if name in parameters else tensor for name, tensor in ready.items()}
    for name in (*made, *aliases):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[aliases.get(name, name)])
