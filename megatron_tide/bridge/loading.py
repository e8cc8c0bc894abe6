"""``load_tokenizer``: a Hugging Face folder or hub name, a SentencePiece model, a tiktoken file -> TextTokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_tide.bridge.codecs import FastCodec, SentencePieceCodec, sentencepiece_roles
from megatron_tide.bridge.tiktoken import read_tiktoken
from megatron_tide.bridge.tokenizer import TextTokenizer, TokenizerSource
from megatron_tide.files import read_json
from megatron_tide.hub import download

DEFAULT_MASKS = ("<|mask|>", "<mask>", "[MASK]")
# Exact names: a copy of a tokenizer, and so a release, never takes code along.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "*.tiktoken.json",
)
_SENTENCEPIECE = "tokenizer.model"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_FILE_SUFFIXES = (".json", ".model", ".tiktoken")


def load_tokenizer(
    path: str | Path, *, mask_token: str | None = None, trust_remote_code: bool = False
) -> TextTokenizer:
    """Load a tokenizer from ``path``.

    - a folder with ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``): as transformers' AutoTokenizer reads it;
    - a folder with ``tokenizer.model``, or a SentencePiece model file: as the sentencepiece library reads it, with
      special tokens and chat template from ``tokenizer_config.json`` and ``chat_template.jinja`` beside it, if present;
    - a ``*.tiktoken`` file, or a folder with one (see ``bridge.tiktoken``);
    - a model's name on the Hugging Face hub.

    ``mask_token`` names the mask token where the tokenizer's own files do not: a token of the vocabulary, or an id in
    digits, which may lie beyond it (some models keep their mask there). Code from the tokenizer's folder runs only with
    ``trust_remote_code``. ValueError where nothing usable is found.
    """
    place, asked = _locate(path, trust_remote_code), _Asked(str(path), mask_token, trust_remote_code)
    if place.is_dir():
        return _load_folder(place, asked)
    if place.suffix == ".json":
        return _load_hugging_face(place.parent, asked)
    if place.suffix == ".tiktoken":
        return _load_tiktoken(place, asked)
    return _load_sentencepiece(place, asked)


@dataclass(frozen=True)
class _Asked:
    """The arguments of a ``load_tokenizer``. ``again()`` makes its result anew: how it travels to another process."""

    name: str
    mask_token: str | None
    trust_remote_code: bool

    def again(self) -> TextTokenizer:
        return load_tokenizer(self.name, mask_token=self.mask_token, trust_remote_code=self.trust_remote_code)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns the libraries' errors for unreadable files into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name}: cannot read the tokenizer ({type(error).__name__}: {reason}); check its files"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' warning about a model type it does not know, when it looks for a tokenizer class."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        logging.set_verbosity(level)


def _locate(path: str | Path, trust_remote_code: bool) -> Path:
    place = Path(path).expanduser()
    if place.exists():
        return place
    name = str(path)
    # "runs/teacher" could be a hub name; where a folder "runs" stands here, the user means a folder.
    local = place.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or place.suffix in _FILE_SUFFIXES
    if "/" in name and (local or place.parent.exists()):
        raise ValueError(f"{name}: no such tokenizer folder or file; check the path")
    patterns = [*TOKENIZER_FILES, "config.json", *(["*.py"] if trust_remote_code else [])]
    return download(name, patterns, f"{name}: neither a tokenizer here nor reachable on the hub; check the name")


def _load_folder(folder: Path, asked: _Asked) -> TextTokenizer:
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return _load_hugging_face(folder, asked)
    if (folder / _SENTENCEPIECE).exists():
        return _load_sentencepiece(folder / _SENTENCEPIECE, asked)
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) == 1:
        return _load_tiktoken(ranks[0], asked)
    raise ValueError(
        f"{asked.name}: holds no tokenizer.json, tokenizer.model or single *.tiktoken file; check the path"
    )


def _load_hugging_face(folder: Path, asked: _Asked) -> TextTokenizer:
    from transformers import AutoTokenizer

    with _reading(asked.name), _quiet():
        raw = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=asked.trust_remote_code)
    if getattr(raw, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{asked.name}: the tokenizer has no fast form; save its tokenizer.json with transformers first"
        )
    kept = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    return _wrap_hugging_face(folder, tuple(dict.fromkeys(kept)), raw, asked)


def _load_tiktoken(file: Path, asked: _Asked) -> TextTokenizer:
    return _wrap_hugging_face(file, (), read_tiktoken(file), asked)


def _wrap_hugging_face(path: Path, files: tuple[Path, ...], raw: Any, asked: _Asked) -> TextTokenizer:
    roles = {
        role.removesuffix("_token"): str(token)
        for role, token in raw.special_tokens_map.items()
        if role.endswith("_token") and token is not None
    }
    _name_mask(asked, roles, raw.get_vocab())
    with _reading(asked.name):
        codec = FastCodec(raw.backend_tokenizer, roles.values())
    template = raw.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    source = TokenizerSource(
        name=asked.name, path=path, files=files, roles=roles, chat_template=template, again=asked.again, raw=raw
    )
    return TextTokenizer(codec, source)


def _load_sentencepiece(model: Path, asked: _Asked) -> TextTokenizer:
    beside = [model.parent / _CONFIG, model.parent / _TEMPLATE] if model.name == _SENTENCEPIECE else []
    files = [model, *(file for file in beside if file.exists())]
    config = read_json(model.parent / _CONFIG, "restore the file") if model.parent / _CONFIG in files else {}
    added = {token["content"]: int(index) for index, token in config.get("added_tokens_decoder", {}).items()}
    roles = {
        role.removesuffix("_token"): token["content"] if isinstance(token, Mapping) else token
        for role, token in config.items()
        if role.endswith("_token") and isinstance(token, str | Mapping)
    }
    with _reading(asked.name):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    # The model's own roles stand where the configuration says nothing.
    roles = sentencepiece_roles(processor) | roles
    pieces = {processor.id_to_piece(index) for index in range(processor.get_piece_size())}
    _name_mask(asked, roles, pieces | added.keys())
    template = config.get("chat_template")
    if model.parent / _TEMPLATE in files:
        template = (model.parent / _TEMPLATE).read_text(encoding="utf-8")
    codec = SentencePieceCodec(processor, added, roles.values())
    source = TokenizerSource(
        name=asked.name,
        path=model if model.name != _SENTENCEPIECE else model.parent,
        files=tuple(files),
        roles=roles,
        chat_template=template,
        again=asked.again,
    )
    return TextTokenizer(codec, source)


def _name_mask(asked: _Asked, roles: dict[str, str], vocabulary: Container[str]) -> None:
    """Settle the mask token: what the user says, what the tokenizer says, or a usual string in the vocabulary."""
    if asked.mask_token is not None:
        # Digits are an id, never a token: vocabularies hold plain numbers, and none of those is a mask.
        if not asked.mask_token.isdecimal() and asked.mask_token not in vocabulary:
            raise ValueError(
                f"{asked.name}: the vocabulary has no token {asked.mask_token!r} to use as the mask; name one it has"
            )
        roles["mask"] = asked.mask_token
    for usual in DEFAULT_MASKS:
        if usual in vocabulary:
            roles.setdefault("mask", usual)
