"""``load_tokenizer``: a Hugging Face folder or hub name, a SentencePiece model, a tiktoken file -> TextTokenizer."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_tide.bounds import TEMPLATE
from megatron_tide.bridge.codecs import MARKER, FastCodec, SentencePieceCodec, sentencepiece_roles
from megatron_tide.bridge.template import tokens_of_turns
from megatron_tide.bridge.tiktoken import read_tiktoken
from megatron_tide.bridge.tokenizer import TextTokenizer, TokenizerSource
from megatron_tide.bridge.tokenizer_files import CONFIG, ROLES, TOKENIZER, check_files
from megatron_tide.files import check_regular, read_json, read_whole
from megatron_tide.gguf_header import read_header
from megatron_tide.hub import download, may_be_hub_name

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
_UNREAD = (_SENTENCEPIECE, "chat_template.json", "vocab.json", "merges.txt")  # beside tokenizer.json: not copied
_TEMPLATE = "chat_template.jinja"
# Keys of a GGUF file: tokenizer.json, {role_token: token} as JSON, the chat template.
GGUF_TOKENIZER, GGUF_ROLES = "tokenizer.huggingface.json", "megatron_tide.tokenizer_roles"
GGUF_TEMPLATE = "tokenizer.chat_template"


def load_tokenizer(
    path: str | Path, *, mask_token: str | None = None, trust_remote_code: bool = False
) -> TextTokenizer:
    """Load a tokenizer from ``path``.

    - a folder with ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``): as transformers' AutoTokenizer reads it;
    - a folder with ``tokenizer.model``, or a SentencePiece model file: as the sentencepiece library reads it, with
      special tokens and chat template from ``tokenizer_config.json`` and ``chat_template.jinja`` next to it;
    - a ``*.tiktoken`` file, or a folder with one (see ``bridge.tiktoken``);
    - a GGUF file that ``convert-gguf`` wrote;
    - a model's name on the Hugging Face hub.

    ``mask_token`` names the mask token where the tokenizer's own files do not: a token of the vocabulary, or an id in
    digits, which may be outside the vocabulary (as in some models). Code from the tokenizer's folder runs only with
    ``trust_remote_code``. ValueError if no tokenizer is found.
    """
    if not str(path):
        raise ValueError("the name of a tokenizer is empty; give a folder, a file, or a name on the hub")
    place, request = _locate(path, trust_remote_code), _LoadRequest(str(path), mask_token, trust_remote_code)
    if place.is_dir():
        return _load_folder(place, request)
    if place.suffix == ".json":
        return _load_hugging_face(place.parent, request)
    if place.suffix == ".tiktoken":
        return _load_tiktoken(place, request)
    if place.suffix == ".gguf":
        return _load_gguf(place, request)
    return _load_sentencepiece(place, request)


@dataclass(frozen=True)
class _LoadRequest:
    """The arguments of ``load_tokenizer``; ``again()`` loads the tokenizer again, in another process."""

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
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
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
    if not may_be_hub_name(name, owner=False):
        raise ValueError(f"{name}: no such tokenizer folder or file; check the path")
    patterns = [*TOKENIZER_FILES, "config.json", *(["*.py"] if trust_remote_code else [])]
    return download(name, patterns, f"{name}: no such local tokenizer, and not reachable on the hub; check the name")


def _load_folder(folder: Path, request: _LoadRequest) -> TextTokenizer:
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return _load_hugging_face(folder, request)
    if (folder / _SENTENCEPIECE).exists():
        return _load_sentencepiece(folder / _SENTENCEPIECE, request)
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) == 1:
        return _load_tiktoken(ranks[0], request)
    raise ValueError(
        f"{request.name}: no tokenizer.json, tokenizer.model or single *.tiktoken file in this folder; check the path"
    )


def _load_hugging_face(folder: Path, request: _LoadRequest) -> TextTokenizer:
    from transformers import AutoTokenizer

    kept = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.exists()]
    for file in (*kept, folder / "config.json"):
        if file.is_dir():
            raise ValueError(f"{file}: not a regular file; restore it")
    check_regular(folder)
    check_files(folder)
    with _reading(request.name), _quiet():
        raw = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=request.trust_remote_code)
    if getattr(raw, "backend_tokenizer", None) is None:
        raise ValueError(f"{request.name}: no fast tokenizer; save its tokenizer.json with transformers first")
    unread = _UNREAD if (folder / TOKENIZER).exists() else ()
    files = (file for file in dict.fromkeys(kept) if ".tiktoken" not in file.name and file.name not in unread)
    return _wrap_hugging_face(folder, tuple(files), raw, request)


def _load_gguf(file: Path, request: _LoadRequest) -> TextTokenizer:
    """The tokenizer that ``convert-gguf`` put into a file whole, as ``tokenizers`` reads it."""
    from transformers import AutoTokenizer

    header = read_header(file)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            roles = json.loads(header.value(GGUF_ROLES, str))
            if not isinstance(roles, dict) or not roles.keys() <= set(ROLES):
                raise ValueError(f"{GGUF_ROLES} is no object of {', '.join(ROLES)}; write it with convert-gguf")
            (folder / CONFIG).write_text(json.dumps({**roles, "tokenizer_class": "PreTrainedTokenizerFast"}))
            (folder / TOKENIZER).write_text(header.value(GGUF_TOKENIZER, str), encoding="utf-8")
            check_files(folder)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {str(error).replace(f'{folder}/', '').removeprefix(f'{file}: ')}") from None
        with _reading(request.name), _quiet():
            raw = AutoTokenizer.from_pretrained(str(folder))
    raw.chat_template = header.value(GGUF_TEMPLATE, str) if GGUF_TEMPLATE in header.values else None
    return _wrap_hugging_face(file, (), raw, request)


def _load_tiktoken(file: Path, request: _LoadRequest) -> TextTokenizer:
    return _wrap_hugging_face(file, (), read_tiktoken(file), request)


def _wrap_hugging_face(path: Path, files: tuple[Path, ...], raw: Any, request: _LoadRequest) -> TextTokenizer:
    roles = {
        role.removesuffix("_token"): str(token)
        for role, token in raw.special_tokens_map.items()
        if role.endswith("_token") and token is not None
    }
    _name_mask(request, roles, raw.get_vocab())
    template = _default_template(request, raw.chat_template)
    added = raw.backend_tokenizer.get_added_tokens_decoder().values()
    turns = tokens_of_turns(
        template, (one.content for one in added if not one.special), {f"{role}_token": roles[role] for role in roles}
    )
    with _reading(request.name):
        codec = FastCodec(raw.backend_tokenizer, turns.union(_strings(roles)))
    source = TokenizerSource(
        name=request.name, path=path, files=files, roles=roles, chat_template=template, again=request.again, raw=raw
    )
    return TextTokenizer(codec, source)


def _load_sentencepiece(model: Path, request: _LoadRequest) -> TextTokenizer:
    beside = [model.parent / CONFIG, model.parent / _TEMPLATE] if model.name == _SENTENCEPIECE else []
    files = [model, *(file for file in beside if file.exists())]
    if files[1:]:
        check_files(model.parent)
    config = read_json(model.parent / CONFIG, "restore the file") if model.parent / CONFIG in files else {}
    roles = {
        key.removesuffix("_token"): value if isinstance(value, str) else value["content"]
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | Mapping)
    }
    content = read_whole(model)
    if not content:  # which the library takes for none, and fails at the first use
        raise ValueError(f"{model}: empty; restore the file")
    with _reading(request.name):
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    added = {
        token["content"]: int(index)
        for index, token in (config.get("added_tokens_decoder") or {}).items()
        if not _is_plain_piece(processor, int(index), token)
    }
    # The model's own roles apply if the configuration does not define them.
    roles = sentencepiece_roles(processor) | roles
    pieces = {processor.id_to_piece(index) for index in range(processor.get_piece_size())}
    _name_mask(request, roles, pieces | added.keys())
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {one["name"]: one["template"] for one in template}
    if model.parent / _TEMPLATE in files:
        with _reading(request.name):
            template = read_whole(model.parent / _TEMPLATE).decode("utf-8-sig")
    template = _default_template(request, template)
    turns = tokens_of_turns(template, pieces | added.keys(), {f"{role}_token": roles[role] for role in roles})
    with _reading(request.name):
        codec = SentencePieceCodec(processor, added, turns.union(_strings(roles)))
    source = TokenizerSource(
        name=request.name,
        path=model if model.name != _SENTENCEPIECE else model.parent,
        files=tuple(files),
        roles=roles,
        chat_template=template,
        again=request.again,
    )
    return TextTokenizer(codec, source)


def _is_plain_piece(processor: sentencepiece.SentencePieceProcessor, index: int, token: Mapping[str, Any]) -> bool:
    """Whether an added token only repeats a piece that ordinary text becomes, as Gemma's line ends and spaces are."""
    said, size = token["content"], processor.get_piece_size()
    plain = token.get("special") is False and not MARKER.fullmatch(said)
    return plain and index < size and processor.id_to_piece(index) == said


def _default_template(request: _LoadRequest, template: Any) -> str | None:
    """The chat template, or of several by name the default one."""
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str | None):
        kind = type(template).__name__
        raise ValueError(f"{request.name}: its chat template is a {kind}, not text; restore the file")
    if len(template or "") > TEMPLATE:
        raise ValueError(f"{request.name}: its chat template has more than {TEMPLATE} characters; restore the file")
    return template


def _strings(roles: Mapping[str, str]) -> set[str]:
    """The tokens with a role. Digits are the id of a mask: a token of the same digits is text."""
    return {token for role, token in roles.items() if role != "mask" or not token.isdecimal()}


def _name_mask(request: _LoadRequest, roles: dict[str, str], vocabulary: Container[str]) -> None:
    """Choose the mask token: the user's, the tokenizer's, or a common string in the vocabulary."""
    if request.mask_token is not None:
        # Digits mean an id, never a token: vocabularies contain plain numbers, and none of those is a mask.
        if not request.mask_token.isdecimal() and request.mask_token not in vocabulary:
            raise ValueError(
                f"{request.name}: the vocabulary has no token {request.mask_token!r} to use as the mask; choose another"
            )
        roles["mask"] = request.mask_token
    for usual in DEFAULT_MASKS:
        if usual in vocabulary:
            roles.setdefault("mask", usual)
