"""A student from an existing model: its weights and tokenizer, with a mask token, and all or some of its layers.

The source is an autoregressive model (the student predicts each position's own token from now on, which training must
teach it: ``recipes/adapt_ar_to_bd3lm.sh``) or a block diffusion one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.mask_token import choose_mask, save_with_mask
from megatron_tide.files import TEMPORARY, AtomicFolder
from megatron_tide.lock import lock_beside
from megatron_tide.models.checkpoint_keys import checkpoint_table, module_tensors
from megatron_tide.models.families import config_dict, family_of, generation_of, meta_model
from megatron_tide.models.gguf_file import gguf_to_folder
from megatron_tide.models.init_model import VOCAB_MULTIPLE, check_out
from megatron_tide.models.load import DTYPES, load_model, resolve_folder, write_folder
from megatron_tide.models.shards import ShardedFolder


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """What changes. ``block_size`` None: the source's, or 32; ``mask_token``: see :func:`choose_mask`;
    ``keep_layers``: see :func:`kept_layers`, None for all.
    """

    block_size: int | None = None
    mask_token: str | None = None
    keep_layers: str | None = None


def student_from(source: str, out: Path, options: StudentOptions, fresh: bool) -> Any:
    """Write the student of ``source`` (folder, hub name or ``.gguf`` file) as the folder ``out``, complete or not at
    all, in the precision that the source is stored in; -> the model.

    Raises:
        ValueError: ``source`` is not such a model, an option does not fit it, or ``out`` holds something else.
    """
    check_out(out, fresh)
    if Path(source).exists() and out.exists() and out.samefile(source):
        raise ValueError(f"--out {out}: is the source itself; use another folder")
    with lock_beside(out), _folder_of(source, out) as folder, AtomicFolder(out) as draft:
        model = load_model(folder, _stored_dtype(folder), as_student=True)
        if options.keep_layers is not None:
            _keep_layers(model, options.keep_layers)
        was_masked = generation_of(folder) == "block_diffusion"
        tokenizer = load_tokenizer(folder)
        known = getattr(model.config, "mask_token_id", None) if was_masked else None
        mask, index = choose_mask(tokenizer, options.mask_token, known=known)
        saved = save_with_mask(tokenizer, draft, mask, index)
        _make_room(model, saved.vocab_size)
        if not was_masked:
            _average_row(model, index, tokenizer.vocab_size)
        if options.block_size is not None:
            model.config.block_size = options.block_size
        model.config.mask_token_id = index
        model.config.eos_token_id, model.config.pad_token_id = saved.eos_id, saved.pad_id
        write_folder(model, draft)
    return model


def unchanged(source: str, out: Path, fresh: bool) -> None:
    """Write the autoregressive model of a ``.gguf`` file as the folder ``out`` in hub format, complete or not at all.

    Raises:
        ValueError: ``source`` is no such file, or ``out`` holds something else.
    """
    if not source.endswith(".gguf"):
        raise ValueError(f"--as-is is for .gguf files, and {source} is none: use it directly")
    check_out(out, fresh)
    with lock_beside(out), AtomicFolder(out) as draft:
        gguf_to_folder(Path(source), draft)


def kept_layers(text: str, count: int) -> list[int]:
    """Which of ``count`` layers ``text`` names: ``K/N``, that share of them, without those in the middle, which a model
    misses least, or their numbers from 0 and ranges, ascending (``0-7,18-29``).

    Raises:
        ValueError: neither.
    """
    what = f"--keep-layers {text[:60]!r}"
    if share := re.fullmatch(r"(\d{1,4})/(\d{1,4})", text):
        part, of = int(share[1]), int(share[2])
        kept = -(-count * part // max(of, 1))
        if not 0 < part <= of <= count:
            raise ValueError(
                f"{what}: K/N keeps K of every N of the model's {count} layers; use 1 <= K <= N <= {count}"
            )
        return [*range(kept // 2), *range(count - kept + kept // 2, count)]
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise ValueError(f"{what}: use K/N (2/3: two thirds of the layers), or numbers and ranges (0-7,18-29)")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    limits = [end for pair in ends for end in pair]
    layers = sorted({layer for pair in ends for layer in range(pair[0], min(pair[-1], count) + 1)})
    if limits != sorted(set(limits)) or limits[-1] >= count:
        raise ValueError(f"{what}: the numbers must ascend, from 0 to {count - 1}")
    return layers


@contextmanager
def _folder_of(source: str, out: Path) -> Iterator[Path]:
    """The source as a folder in hub format; that of a GGUF file is temporary, beside ``out``."""
    if not source.endswith(".gguf"):
        yield resolve_folder(source)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{TEMPORARY}gguf-") as scratch:
        gguf_to_folder(Path(source), Path(scratch))
        yield Path(scratch)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type that the embedding is stored in; fp32 for one that no model here is kept in."""
    model = meta_model(folder)
    family, stored = family_of(model), ShardedFolder(folder)
    table = checkpoint_table(module_tensors(model), family)
    wanted = f"{family.layout.embedding}.weight"
    keys = [key for key, slot in table.items() if slot.name == wanted and key in stored.keys]
    found = [tensor.dtype for _, tensor in stored.tensors(keys)]
    return found[0] if found and found[0] in DTYPES.values() else torch.float32


def _keep_layers(model: Any, text: str) -> None:
    path = family_of(model).layout.layers
    layers = model.get_submodule(path)
    kept = kept_layers(text, len(layers))
    model.set_submodule(path, nn.ModuleList(layers[number] for number in kept))
    model.config.num_hidden_layers = len(kept)
    expected = meta_model(config_dict(model, torch.float32))
    if _shapes(expected) != _shapes(model):
        raise ValueError(
            f"--keep-layers {text}: the layers of this model differ in kind, and those do not fit together"
        )


def _shapes(model: Any) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in module_tensors(model).items()}


def _embeddings(model: Any) -> list[tuple[Any, Tensor]]:
    """(module, weight [V, H]) of input and output embedding; one tensor where they are tied."""
    layout = family_of(model).layout
    return [(part, part.weight) for part in map(model.get_submodule, (layout.embedding, layout.output))]


@torch.no_grad()
def _make_room(model: Any, tokens: int) -> None:
    """Grow the embeddings, by rows that are the mean of all, if they are too small for ``tokens`` ids."""
    if tokens <= model.config.vocab_size:
        return
    size = -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    grown: dict[int, nn.Parameter] = {}
    for part, weight in _embeddings(model):
        if id(weight) not in grown:
            more = weight.float().mean(0).to(weight.dtype).expand(size - len(weight), -1)
            grown[id(weight)] = nn.Parameter(torch.cat((weight, more)))
        part.weight = grown[id(weight)]
    model.config.vocab_size = size


@torch.no_grad()
def _average_row(model: Any, index: int, tokens: int) -> None:
    """Set the rows of token ``index`` to the mean of those of the vocabulary's ``tokens`` ids."""
    for weight in {id(weight): weight for _, weight in _embeddings(model)}.values():
        weight[index] = weight[:tokens].float().mean(0)
