"""Checkpoint -> release folder: all of it, checked, or nothing.

The folder is made beside its final place under a temporary name and renamed when the parity gate has held, so ``OUT``
either does not exist, is what stood there before, or is a whole release.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.bridge import load_tokenizer
from megatron_tide.files import write_json
from megatron_tide.models import DTYPES, read_config
from megatron_tide.release.card import model_card, public_run
from megatron_tide.release.export import export, generation_of
from megatron_tide.release.parity import check_parity
from megatron_tide.training_checkpoint import TrainingCheckpoint, open_checkpoint


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert; ``base_model`` and ``name`` None: as recorded, and as the folder is called."""

    dtype: str = "bfloat16"
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    base_model: str | None = None
    name: str | None = None
    license_id: str = "apache-2.0"


def convert(checkpoint: str | Path, out: str | Path, options: Options) -> dict[str, Any]:
    """Make the release ``out`` of ``checkpoint`` (a step folder, or a run folder's newest); the parity record.

    Raises:
        ValueError: a damaged or foreign checkpoint, an ``out`` that exists, or a parity gate that does not hold.
        OSError: the disk. In every case ``out`` is as it was.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out}: exists and is not a folder; choose another name")
    if out.exists() and any(out.iterdir()) and not options.overwrite:
        raise ValueError(f"{out}: already exists; choose another folder, or pass --overwrite to replace it")
    if out.exists() and options.overwrite and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"{out}: holds something that is not a model, which --overwrite will not remove")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: choose one of {', '.join(DTYPES)}")
    trained = open_checkpoint(checkpoint, options.base_model)
    draft = out.with_name(f".{out.name}.converting")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        parity = _fill(draft, trained, options, options.name or out.name)
        _replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return parity


def _fill(draft: Path, trained: TrainingCheckpoint, options: Options, name: str) -> dict[str, Any]:
    family, _ = read_config(trained.base_model, as_student=True)
    dtype = DTYPES[options.dtype]
    tokenizer = load_tokenizer(trained.base_model)
    knobs = generation_of(trained, tokenizer)
    export(trained, tokenizer, family.release, draft, dtype=dtype, max_shard_bytes=options.max_shard_bytes)
    parity = check_parity(draft, trained, tokenizer, family.release, knobs, dtype)
    write_json(draft / "parity.json", parity)
    write_json(draft / "provenance.json", {"run": public_run(trained.run), "state": trained.state})
    card = model_card(trained, family, knobs, parity, name=name, license_id=options.license_id)
    (draft / "README.md").write_text(card, encoding="utf-8")
    return parity


def _replace(draft: Path, out: Path) -> None:
    """Two renames: a release that stood at ``out`` is removed only once the new one is in its place."""
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    draft.rename(out)
    shutil.rmtree(old, ignore_errors=True)
