"""A mask token for a tokenizer that has none: chosen, and written into its files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from megatron_tide.bounds import check_id
from megatron_tide.bridge.loading import DEFAULT_MASKS, load_tokenizer
from megatron_tide.bridge.tokenizer import TextTokenizer
from megatron_tide.files import read_json, write_json

_NEW = re.compile(r"[!-~]{1,64}")
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
_PROBE = "def add(a, b):\n    return a + b  # 1234, naïve 世界\n"


def choose_mask(tokenizer: TextTokenizer, wanted: str | None, *, known: int | None = None) -> tuple[str, int]:
    """The mask token of a student with this tokenizer, and its id: one past the vocabulary if the token is new.

    ``wanted``: a token, which may be new; the id, in digits, of one that no text becomes; or None, for the tokenizer's
    own, or else a new ``<|mask|>``. ``known``: the id that the model was trained with, if it was.

    Raises:
        ValueError: text, a response's end, padding, or the chat template contains the token; or ``known`` is another.
    """
    own = known if known is not None else tokenizer.describe()["mask_id"]
    token, index = _look_up(tokenizer, wanted if wanted is not None else DEFAULT_MASKS[0] if own is None else str(own))
    what = f"{tokenizer.name}: the token {token!r} (id {index})"
    if known is not None and index != known:
        raise ValueError(f"{what} is not the mask that the model was trained with (id {known}); omit --mask-token")
    if index == tokenizer.vocab_size:
        if not _NEW.fullmatch(token):
            raise ValueError(
                f"{tokenizer.name}: the mask token {token[:70]!r} must be 1 to 64 characters without spaces"
            )
        return token, index
    if not tokenizer.may_be_mask(index):
        raise ValueError(f"{what} is text, so it cannot be the mask; choose an unused token, or a new one")
    if index in (tokenizer.eos_id, tokenizer.pad_id):
        raise ValueError(f"{what} ends responses or pads them, so it cannot be the mask; choose another")
    if tokenizer.template_fingerprint is not None:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        if token in tokenizer.render(talk):
            raise ValueError(f"{what} is part of every prompt, so it cannot be the mask; choose another")
    return token, index


def _look_up(tokenizer: TextTokenizer, wanted: str) -> tuple[str, int]:
    count = tokenizer.vocab_size
    if not wanted.isdecimal():
        found = (index for index in range(count) if tokenizer.id_to_token(index) == wanted)
        return wanted, next(found, count)
    index = int(wanted)
    check_id(tokenizer.name, "of the mask", index)
    token = DEFAULT_MASKS[0] if index == count else tokenizer.id_to_token(index)
    if token is None:
        raise ValueError(
            f"{tokenizer.name}: no token has id {index}; use one of 0 to {count - 1}, or a new token's string"
        )
    return token, index


def save_with_mask(tokenizer: TextTokenizer, folder: Path, token: str, index: int) -> TextTokenizer:
    """Write the tokenizer's files into ``folder``, with ``token`` of id ``index`` as the mask; -> what they load as.

    Raises:
        ValueError: they load as another tokenizer.
    """
    tokenizer.save(folder)
    if tokenizer.describe()["mask_id"] != index:
        _name_mask(folder, token, index if index == tokenizer.vocab_size else None)
    try:
        saved = load_tokenizer(folder)
        saved.eos_id  # noqa: B018 (it must have one)
    except ValueError as error:
        raise ValueError(f"{tokenizer.name}: with the mask token {token!r}, {error}") from None
    same = saved.describe()["mask_id"] == index and np.array_equal(saved.encode(_PROBE), tokenizer.encode(_PROBE))
    for name in ("eos_id", "pad_id", "template_fingerprint"):
        same = same and getattr(saved, name) == getattr(tokenizer, name)
    if not same:
        raise ValueError(
            f"{tokenizer.name}: the mask token {token!r} cannot be added to this tokenizer's files; choose one of its "
            "unused tokens, or save it with transformers first"
        )
    return saved


def _name_mask(folder: Path, token: str, new: int | None) -> None:
    """Make ``token`` the mask token in a tokenizer's files; ``new``: its id if the vocabulary lacks it."""
    fast, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    config["mask_token"] = token
    if new is not None and (not fast.is_file() or "added_tokens_decoder" in config):
        config["added_tokens_decoder"] = {
            **(config.get("added_tokens_decoder") or {}),
            str(new): {"content": token, **_FLAGS},
        }
    write_json(settings, config)
    if new is not None and fast.is_file():
        content = read_json(fast)
        content["added_tokens"] = [*(content.get("added_tokens") or []), {"id": new, "content": token, **_FLAGS}]
        write_json(fast, content)
    if (folder / "special_tokens_map.json").is_file():
        roles = read_json(folder / "special_tokens_map.json")
        write_json(folder / "special_tokens_map.json", {**roles, "mask_token": token})
