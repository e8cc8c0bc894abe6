"""Checkpoint -> release: a folder that needs transformers only, checked, complete or absent; and its upload to the hub.

Weights are read one tensor at a time and written one shard at a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import validate_repo_id

import megatron_tide.models
from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.cli import say
from megatron_tide.files import AtomicFolder, fingerprint, read_json, sha256_file, write_json
from megatron_tide.hub import hub_errors
from megatron_tide.lock import lock_beside
from megatron_tide.models import DTYPES, meta_model
from megatron_tide.models.checkpoint_keys import Slot, checkpoint_table, module_tensors, tied_aliases
from megatron_tide.models.families import FAMILIES, config_dict, family_of
from megatron_tide.models.shards import NOT_THE_MODEL, ShardedFolder, write_shards
from megatron_tide.release.card import (
    card_identity,
    check_card_text,
    has_scores,
    keep_scores,
    model_card,
    public_run,
    public_state,
)
from megatron_tide.release.parity import check_parity
from megatron_tide.release.tokenizer_config import clean_tokenizer_files
from megatron_tide.training_checkpoint import GenerationIds, TrainingCheckpoint, open_checkpoint

MODELS = Path(megatron_tide.models.__file__).parent
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert. ``base_model`` None: the one that the run recorded; ``name`` None: the name of the folder.

    ``format``: the model type to write it as, of a family whose ``release.of`` is the trained one; "": its own.
    ``repository``: the hub name that it will be uploaded to, for the card's examples. ``languages``: of the data, for
    the card.
    """

    dtype: str = "bfloat16"
    format: str = ""
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    base_model: str | None = None
    name: str | None = None
    repository: str | None = None
    license_id: str = "apache-2.0"
    languages: tuple[str, ...] = ("en",)
    skip_parity: bool = False


def convert(checkpoint: str | Path, out: str | Path, options: Options) -> dict[str, Any]:
    """Create the release ``out`` from ``checkpoint`` (a step folder, or a run folder: its newest step) -> parity
    record, empty with ``skip_parity``.

    Raises:
        ValueError: a corrupt checkpoint, an ``out`` that exists or is being written, or a parity gate that fails.
        OSError: the disk. In every case ``out`` is as it was.
    """
    out = Path(out)
    name = options.name or out.resolve().name
    check_card_text(name=name, license=options.license_id, **{"language": " ".join(options.languages)})
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out}: exists and is not a folder; choose another name")
    if out.exists() and any(out.iterdir()) and not options.overwrite:
        raise ValueError(f"{out}: already exists; choose another folder, or pass --overwrite to replace it")
    if out.exists() and options.overwrite and any(out.iterdir()) and not _is_release(out):
        raise ValueError(f"{out}: not a model that convert wrote, so --overwrite does not remove it; choose another")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: choose one of {', '.join(DTYPES)}")
    trained = open_checkpoint(checkpoint, options.base_model)
    if out.exists() and any(out.samefile(read) for read in (trained.base_model, trained.folder)):
        raise ValueError(f"{out}: is what the release is made from; choose another folder")
    with lock_beside(out), AtomicFolder(out) as draft:
        parity = _fill(draft, trained, options, name)
        if out.exists():
            _keep(out, draft)
        return parity


def _is_release(folder: Path) -> bool:
    """Whether a folder of a model is a release, or has no weights that would be gone for good."""
    weights = any(path.suffix in (".safetensors", ".bin", ".gguf") for path in folder.iterdir())
    return (folder / "config.json").is_file() and ((folder / "provenance.json").is_file() or not weights)


def _keep(old: Path, draft: Path) -> None:
    """Say what of the release ``old`` goes for good. What no loader reads (folders, results, notes) comes into
    ``draft``, and so do the card's scores if they are the same model's.
    """
    new, released = {path.name for path in draft.iterdir()}, released_files(old)
    gone = []
    for path in sorted(old.iterdir()):
        if path.name in new:
            continue
        if path.name in released or path.name in FOLDERS_READ:
            gone.append(path.name)
        elif path.is_dir() and not path.is_symlink():
            shutil.copytree(path, draft / path.name, symlinks=True, copy_function=os.link)
        else:
            os.link(path, draft / path.name, follow_symlinks=False)
    if gone:
        say(f"{old}: {', '.join(gone)} of the release before are removed")
    edited = card_identity(old)
    if edited and _written_card(old) not in ("", edited):
        with contextlib.suppress(FileExistsError):
            os.link(old / "README.md", draft / f"README.{edited[:8]}.md", follow_symlinks=False)
        say(f"{old}: its README.md was edited, and is kept as README.{edited[:8]}.md")
    if has_scores(old) and _same_model(old, draft):
        keep_scores(old, draft)
    elif has_scores(old):
        why = "were of other weights or settings, and are left out; evaluate --card measures again"
        say(f"{old}: the card's scores {why}")


def _written_card(folder: Path) -> str:
    """The identity of the card that convert wrote; "" where that is not known."""
    try:
        return str(read_json(folder / "provenance.json").get("card", ""))
    except ValueError:
        return ""


def released_files(folder: Path) -> list[str]:
    """The names of the files in ``folder`` that are of a release, or that a loader would read; results are not."""
    files = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted(name for name in files if name in RELEASED or any(fnmatch(name, one) for one in READ_BY_LOADERS))


def _same_model(old: Path, new: Path) -> bool:
    """Whether all that an evaluation reads is the same: weights, configuration, tokenizer, chat template."""
    found = []
    for folder in (old, new):
        names = [name for name in released_files(folder) if name not in RELEASED and not name.endswith(".py")]
        sums = [_without_version(folder / name) or sha256_file(folder / name) for name in names]
        found.append(list(zip(names, sums)))
    return found[0] == found[1]


def _without_version(path: Path) -> str:
    """Of a configuration, what it says but for the library that wrote it; "" for another file."""
    if path.name not in ("config.json", "generation_config.json"):
        return ""
    try:
        return fingerprint({key: value for key, value in read_json(path).items() if key not in NOT_THE_MODEL})
    except ValueError:  # edited by hand, and no JSON
        return ""


def _fill(draft: Path, trained: TrainingCheckpoint, options: Options, name: str) -> dict[str, Any]:
    model, dtype = meta_model(trained.base_model, as_student=True), DTYPES[options.dtype]
    family, tokenizer = family_of(model), load_tokenizer(trained.base_model)
    ids = trained.generation_ids(tokenizer.fingerprint, tokenizer.template_fingerprint)
    if options.format not in ("", *family.model_types):
        model = _in_format(model, options.format, ids)
        family = family_of(model)
    export(trained, model, tokenizer, ids, draft, dtype=dtype, max_shard_bytes=options.max_shard_bytes)
    parity = {}
    if not options.skip_parity:
        parity = check_parity(draft, trained, tokenizer, family.release, ids, dtype)
        write_json(draft / "parity.json", parity)
    card = model_card(
        trained,
        family,
        ids,
        parity,
        name=name,
        repository=options.repository,
        license_id=options.license_id,
        languages=options.languages,
    )
    (draft / "README.md").write_text(card, encoding="utf-8")
    about = {"run": public_run(trained.run), "state": public_state(trained), "card": card_identity(draft)}
    write_json(draft / "provenance.json", about)
    return parity


def _in_format(model: Any, name: str, ids: GenerationIds) -> Any:
    """The module without memory whose tensors and config are those of ``model`` in the format ``name``."""
    own, family = family_of(model).model_types[0], FAMILIES.get(name)
    if family is None or family.release.of != own:
        others = ", ".join(key for key, other in FAMILIES.items() if other.release.of == own) or "nothing else"
        raise ValueError(f"--format {name}: a model of type {own} can be written as {own} or {others}")
    if family.release.mask_id not in (None, ids.mask_token_id):
        raise ValueError(
            f"--format {name}: its programs know only {family.release.mask_id} as the mask, and this model's is "
            f"{ids.mask_token_id}; leave out --format, or train from a start with that mask (init-model --mask-token)"
        )
    return meta_model({**config_dict(model, torch.float32), "model_type": name, "tie_word_embeddings": False})


def export(
    trained: TrainingCheckpoint,
    model: Any,
    tokenizer: TextTokenizer,
    ids: GenerationIds,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write weights, config, generation config, tokenizer and code into the empty folder ``out``.

    ``model``: the student's module without memory.
    """
    files = family_of(model).release
    write_shards(out, _tensors(model, trained, dtype), max_shard_bytes)
    config: dict[str, Any] = config_dict(model, dtype) | asdict(ids)
    if files.auto_map:
        config["auto_map"] = files.auto_map
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {**asdict(ids), "do_sample": False})
    tokenizer.save(out)
    clean_tokenizer_files(out, tokenizer, config.get("max_position_embeddings"))
    released = load_tokenizer(out)
    if released.fingerprint != tokenizer.fingerprint or released.template_fingerprint != tokenizer.template_fingerprint:
        raise ValueError(
            f"{trained.base_model}: its tokenizer or chat template is another one without what a release leaves out; "
            "save it with save_pretrained of transformers"
        )
    for name in files.code:
        shutil.copyfile(MODELS / name, out / name)


def _tensors(model: Any, trained: TrainingCheckpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(public key, tensor in the release's precision); what was never trained comes from the base model."""
    shapes = module_tensors(model)
    stored, start = trained.names(), ShardedFolder(trained.base_model)
    copies = tied_aliases(meta_model(trained.base_model, as_student=True))  # tied in training, written out in a format
    unknown = sorted(stored - set(shapes))
    if unknown:
        raise ValueError(f"{trained.folder}: contains {unknown[0]}, which is not in {trained.base_model}/config.json")
    held: tuple[str, torch.Tensor] | None = None  # a layer's stacked experts are read once for all their keys
    for key, slot in checkpoint_table(shapes, family_of(model)).items():
        name = copies.get(slot.name, slot.name)
        if name not in stored:
            yield key, _untrained(start, key, slot)
            continue
        if held is None or held[0] != name:
            held = (name, trained.tensor(name).to(dtype))
            if held[1].shape != shapes[slot.name].shape:
                raise ValueError(
                    f"{trained.folder}: {slot.name} has shape {list(held[1].shape)}, {trained.base_model}/config.json "
                    f"gives {list(shapes[slot.name].shape)}; set the right folder with --base-model"
                )
        yield key, slot.of({slot.name: held[1]})


def _untrained(start: ShardedFolder, key: str, slot: Slot) -> torch.Tensor:
    if key not in start.keys:
        raise ValueError(f"{start.folder}: {key} is missing, also from the checkpoint")
    ((_, tensor),) = start.tensors([key])
    return tensor


def parse_size(text: str) -> int:
    """``"5GB"``, ``"500MiB"`` or a number of bytes -> bytes. ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"--max-shard-size {text}: use a size such as 5GB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


# What loaders read in a folder: of a release that is replaced, none of it stays beside the new files.
_SUFFIXES = (
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "h5",
    "msgpack",
    "gguf",
    "onnx",
    "jinja",
    "model",
    "tiktoken",
    "py",
)
READ_BY_LOADERS = [f"*.{suffix}" for suffix in _SUFFIXES]
READ_BY_LOADERS += [f"*{word}*.json" for word in ("config", "index", "token", "vocab", "template")]
READ_BY_LOADERS += ["*merges*.txt", "*vocab*.txt"]
READ_BY_LOADERS += ["params.json", "tekken.json", "*.model.v*"]  # another format, which engines prefer
FOLDERS_READ = ("custom_generate", "additional_chat_templates")  # by transformers: code, and templates
RELEASED = ("README.md", "parity.json", "provenance.json")


@contextlib.contextmanager
def _one_commit() -> Iterator[None]:
    """With hf_xet, the client commits a folder in parts: one that fails would leave old shards beside new ones."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


class Hub:
    """A repository of the hub, checked before the conversion that will be uploaded to it.

    Raises:
        ValueError: an invalid name or one without an owner, no login, a repository that exists (unless ``overwrite``),
            or a public one that should be ``private``.
    """

    def __init__(self, repository: str, *, private: bool, overwrite: bool, api: Any = None) -> None:
        self._repository, self._private = repository, private
        self._api = api or HfApi()
        self._what = f"--push-to-hub {repository}: the hub refuses, or cannot be reached"
        if "/" not in repository:  # a name alone is that of another repository in each call of the client
            raise ValueError(f"--push-to-hub {repository}: no owner; use OWNER/{repository}")
        with hub_errors(self._what):
            validate_repo_id(repository)
            self._api.whoami()
            exists = self._api.repo_exists(repository)
        if exists and not overwrite:
            raise ValueError(f"{repository}: exists on the hub; choose another name, or pass --overwrite")
        if exists:
            self._check_private()

    def push(self, folder: Path) -> str:
        """Upload the release in ``folder``, not what else is there, and remove the one it replaces, as one commit;
        -> the address of the repository's page.

        Raises:
            ValueError: the hub cannot be reached or refuses, or the repository is public and should be private.
        """
        with hub_errors(self._what):
            url = self._api.create_repo(self._repository, private=self._private, exist_ok=True)
        self._check_private()  # again: creating one that exists does not change it
        with hub_errors(self._what), _one_commit():
            self._api.upload_folder(
                repo_id=self._repository,
                folder_path=folder,
                commit_message=f"Release {folder.name}",
                allow_patterns=released_files(folder),
                delete_patterns=READ_BY_LOADERS,
            )
        return str(url)

    def _check_private(self) -> None:
        if not self._private:
            return
        with hub_errors(self._what):
            private = self._api.repo_info(self._repository).private
        if private is not True:
            raise ValueError(
                f"{self._repository}: is public on the hub, so --private cannot hold; make it private in its settings "
                "first, or choose another name"
            )
