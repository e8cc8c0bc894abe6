"""The JSON files of a tokenizer as a release has them: keys on a list, each with a value of its form.

A starting folder is a stranger's. Nothing of it that names code (``auto_map``), a path or a secret goes out, at any
depth; what is not of its form is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_tide.bridge import TextTokenizer
from megatron_tide.bridge.tokenizer_files import CONFIG, ROLES
from megatron_tide.files import read_json, write_json

_FLAGS = {
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "is_local",
    "legacy",
    "spaces_between_special_tokens",
    "split_special_tokens",
    "use_default_system_prompt",
}
_WORDS = {
    "backend": r"tokenizers|sentencepiece",
    "errors": r"strict|replace|ignore",
    "padding_side": r"left|right",
    "tokenizer_class": r"\w{1,100}",
    "truncation_side": r"left|right",
}
_TOKENS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_TOKEN = {"__type": str, "content": str} | dict.fromkeys(
    ("lstrip", "normalized", "rstrip", "single_word", "special"), bool
)
_NAME = r"[\w-]{1,100}"  # of a token of several


def clean_tokenizer_files(folder: Path, tokenizer: TextTokenizer, longest: int | None) -> None:
    """Keep what is on the list in the JSON files beside the vocabulary of ``tokenizer``; what it returns is what the
    model takes, of up to ``longest`` tokens.

    transformers 5 writes a class name that 4 does not have; both accept the older one.
    """
    known = {tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)}
    roles, added, path = folder / "special_tokens_map.json", folder / "added_tokens.json", folder / CONFIG
    if roles.is_file():
        write_json(roles, _listed(read_json(roles), known))
    if added.is_file():
        tokens = read_json(added).items()
        write_json(added, {token: index for token, index in tokens if tokenizer.id_to_token(index) == token})
    if not path.is_file():
        return
    config = read_json(path)
    kept = _listed(config, known)
    if "tokenizer_class" in kept and "TokenizersBackend" in (kept["tokenizer_class"], type(tokenizer.raw).__name__):
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    kept["model_input_names"] = ["input_ids", "attention_mask"]
    if longest is not None:
        kept["model_max_length"] = min(longest, kept.get("model_max_length") or longest)
    if kept != config:
        write_json(path, kept)


def _listed(config: dict[str, Any], known: set[str | None]) -> dict[str, Any]:
    kept = {key: _of_form(key, value, known) for key, value in config.items()}
    return {key: value for key, value in kept.items() if value is not None or (key in ROLES and config[key] is None)}


def _of_form(key: str, value: Any, known: set[str | None]) -> Any:
    """``value`` without what does not belong there; None for what is not on the list. ``known``: the vocabulary."""
    if key in _FLAGS:
        return value if isinstance(value, bool) else None
    if key in _WORDS:
        return value if isinstance(value, str) and re.fullmatch(_WORDS[key], value, flags=re.A) else None
    if key == "model_max_length":
        return value if type(value) in (int, float) else None
    if key == "added_tokens_decoder":
        return {index: _token(token) for index, token in value.items()} if isinstance(value, dict) else None
    if key == "chat_template":  # of several by name, the one that was trained with
        named = {one.get("name"): one.get("template") for one in value} if isinstance(value, list) else value
        template = named.get("default") if isinstance(named, dict) else named
        return template if isinstance(template, str) else None
    if key in _TOKENS and isinstance(value, list | dict):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        kept = {
            name: _token(token) for name, token in named if re.fullmatch(_NAME, str(name)) and _text(token) in known
        }
        return kept if isinstance(value, dict) else list(kept.values())
    # A name such as auth_token may be a token of the vocabulary, or somebody's secret.
    return _token(value) if key in ROLES or (key.endswith("_token") and _text(value) in known) else None


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _token(token: Any) -> Any:
    """A token's text, or of an object what makes a token."""
    if isinstance(token, dict):
        return {key: value for key, value in token.items() if isinstance(value, _TOKEN.get(key, ()))}
    return token if isinstance(token, str) else None
