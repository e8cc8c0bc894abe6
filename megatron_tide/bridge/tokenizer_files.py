"""A tokenizer folder's JSON files, checked before libraries read them: types, ids, sizes; one line for what is wrong.

Libraries take memory for all ids below the largest one, believe any type, and answer later or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tide.bounds import TEMPLATE, TOKEN_BYTES, check_id
from megatron_tide.files import check_regular, read_json

LARGEST = 1 << 27
"""Bytes of a file: the largest public one has 2^25."""
TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_CLASS = re.compile(r"\w*(Tokenizer|Backend)\w*", flags=re.A)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_TEMPLATES, _VERSIONS = "additional_chat_templates", "fast_tokenizer_files"
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LONG = {"precompiled_charsmap": LARGEST, "Regex": 1 << 16}  # characters of texts of a step; of others as a token's
_WRITTEN = 1 << 18  # characters of all texts of the steps, but regular expressions and tables
GROWTH = 1 << 8
"""How many times as long replacements may make a text."""


def check_files(folder: Path) -> None:
    """ValueError, one line that names the file, for what no tokenizer has, and for files that transformers would read
    in place of those that a release takes along. Missing files are none of its business.
    """
    if (folder / _TEMPLATES).is_dir():
        check_regular(folder / _TEMPLATES)
    if (folder / _TEMPLATES / "default.jinja").exists():
        raise ValueError(f"{folder / _TEMPLATES / 'default.jinja'}: move it to {folder / 'chat_template.jinja'}")
    checks = {
        TOKENIZER: _check_tokenizer,
        "vocab.json": _check_ids,
        "added_tokens.json": _check_ids,
        CONFIG: _check_config,
        "special_tokens_map.json": _check_roles,
        "config.json": _check_class,
    }
    for name, check in checks.items():
        path = folder / name
        if not path.exists():
            continue
        _check_size(path, LARGEST)
        check(path, read_json(path, "restore the file"))
    texts = [(path, 4 * TEMPLATE) for place in (".", _TEMPLATES) for path in folder.glob(f"{place}/*.jinja")]
    for path, most in [*texts, (folder / "merges.txt", LARGEST)]:
        if path.is_file():
            _check_size(path, most)


def _check_size(path: Path, most: int) -> None:
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path}: has {size} bytes, more than {most}; restore the file")


def check_own(file: Path) -> None:
    """ValueError for a link to a file of another folder, which could be anything of the user's: what is copied may be
    published. The hub's cache links to its own ``blobs``.
    """
    place, real = file.parent.resolve(), file.resolve()
    if real.parent != place and not (place.parent.name == "snapshots" and real.parent == place.parents[1] / "blobs"):
        raise ValueError(f"{file}: a link to {real}, outside its folder; replace it by a copy of that file")


def _wrong(path: Path, what: str, wanted: str, found: object) -> ValueError:
    return ValueError(f"{path}: {what[:60]} must be {wanted}, not {json.dumps(found)[:40]}; restore the file")


def _check_string(path: Path, what: str, token: object) -> None:
    """A token: text of a size that tokens have."""
    if not isinstance(token, str) or not token:
        raise _wrong(path, what, "text", token)
    if len(token) > TOKEN_BYTES:
        raise ValueError(f"{path}: {what} has {len(token)} characters, more than {TOKEN_BYTES}; restore the file")


def _check_token(path: Path, what: str, token: object) -> None:
    """A token: text, or an object with it."""
    _check_string(path, what, token.get("content") if isinstance(token, dict) else token)


def _check_ids(path: Path, content: dict[str, Any]) -> None:
    for token, index in content.items():
        check_id(str(path), token, index)
        if token:
            _check_string(path, "a token", token)


def _check_tokenizer(path: Path, content: dict[str, Any]) -> None:
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict):
        raise _wrong(path, "model", "an object", model)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        _check_ids(path, vocabulary)
    elif isinstance(vocabulary, list):
        for pair in vocabulary:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise _wrong(path, "a piece of its vocabulary", "a text and its score", pair)
            if pair[0]:
                _check_string(path, "a piece of its vocabulary", pair[0])
    if added is not None and not isinstance(added, list):
        raise _wrong(path, "added_tokens", "a list of objects", added)
    for token in added or ():
        if not isinstance(token, dict):
            raise _wrong(path, "an added token", "an object", token)
        _check_string(path, "content of an added token", token.get("content"))
        check_id(str(path), token["content"], token.get("id"))
    for part in _STEPS:
        _check_step(path, part, content.get(part))
    _check_step(path, "model", {key: value for key, value in model.items() if isinstance(value, str)})


def _check_step(path: Path, part: str, content: Any) -> None:
    """What is done to texts, at any depth: with texts of its own as long as those of tokenizers are, and replacements
    that do not multiply a text without end.
    """
    growth, left, written = 1, [content], 0
    while left:
        step = left.pop()
        left += step if isinstance(step, list) else step.values() if isinstance(step, dict) else ()
        if not isinstance(step, dict):
            continue
        for key, text in step.items():
            if isinstance(text, str) and len(text) > _LONG.get(key, TOKEN_BYTES):
                raise ValueError(f"{path}: {part} has {key[:60]!r} of {len(text)} characters; restore the file")
            written += len(text) if isinstance(text, str) and key not in _LONG else 0
        pattern, text = step.get("pattern"), step.get("content")
        if isinstance(pattern, dict) and isinstance(text, str):
            taken = pattern.get("String")  # a regular expression may take nothing
            growth *= max(1, len(text) // len(taken)) if isinstance(taken, str) and taken else len(text) + 1
    if written > _WRITTEN:  # many steps may each write a text before every other
        raise ValueError(f"{path}: {part} has texts of {written} characters; restore the file")
    if growth > GROWTH:
        raise ValueError(f"{path}: {part} makes texts {str(growth)[:20]} times as long; restore the file")


def _check_class(path: Path, content: dict[str, Any]) -> None:
    """ValueError where ``tokenizer_class`` is none: transformers would load whatever of its classes has the name."""
    name = content.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _CLASS.fullmatch(name)):
        raise _wrong(path, "tokenizer_class", "the name of a tokenizer's class", name)


def _check_config(path: Path, content: dict[str, Any]) -> None:
    _check_class(path, content)
    if content.get(_VERSIONS) not in (None, [], [TOKENIZER]):
        raise ValueError(
            f"{path}: {_VERSIONS} names others than {TOKENIZER}; rename the right one, and remove that key"
        )
    added, template = content.get("added_tokens_decoder"), content.get("chat_template")
    if added is not None and not isinstance(added, dict):
        raise _wrong(path, "added_tokens_decoder", "an object", added)
    for index, token in (added or {}).items():
        if not isinstance(token, dict):
            raise _wrong(path, f"added token {index}", "an object", token)
        _check_string(path, f"content of added token {index[:20]}", token.get("content"))
        number = index.isascii() and index.isdecimal() and len(index) < 20
        check_id(str(path), token["content"], int(index) if number else index)
    for text in _templates(path, template):
        if not isinstance(text, str):
            raise _wrong(path, "chat_template", "text", text)
    _check_roles(path, content)


def _templates(path: Path, template: Any) -> Iterator[Any]:
    if isinstance(template, list):
        for one in template:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise _wrong(path, "a chat template of several", "an object with a name", one)
            yield one.get("template")
    elif isinstance(template, dict):
        yield from template.values()
    elif template is not None:
        yield template


def _check_roles(path: Path, content: dict[str, Any]) -> None:
    for role, token in content.items():
        known = role in ROLES
        if token is not None and (known or (role.endswith("_token") and isinstance(token, str | dict))):
            _check_token(path, role, token)
    for name in _LISTS:
        tokens = content.get(name)
        if tokens is not None and not isinstance(tokens, list | dict):
            raise _wrong(path, name, "a list of tokens", tokens)
        for token in (tokens.values() if isinstance(tokens, dict) else tokens) or ():
            _check_token(path, f"a token of {name}", token)
