"""The largest sizes that files may state: far above any model of today, and checked before memory is taken for them."""

from __future__ import annotations

from typing import Any

MOST_IDS = 1 << 24
"""Ids of a vocabulary, holes included (the largest public one has 2^18)."""
MOST_NUMBER = 1e30
LONGEST_NAME = 1 << 10
"""Characters of a path or a column's name in a data mixture, or of a shard's in an index."""
TOKEN_BYTES = 1 << 12
"""Bytes of one token in a tiktoken file."""
ADDED_TOKENS = 1 << 14
"""Added tokens in a tiktoken file's settings (of public ones, some thousand)."""
TEMPLATE = 1 << 20
"""Characters of a chat template."""
MOST_STEPS = 10**8 - 1
"""Of a training: the names of its checkpoints have eight digits, and sort."""
MERGED_BYTES = 1 << 28
"""Bytes of all pairs of tokens that join to a token of a tiktoken file (of the largest public one, 2^23), or, of a GGUF
file, of all pairs that tokens can be cut into."""
CONFIG = {
    "vocab_size": MOST_IDS,
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "num_shared_experts": 1 << 10,
    "max_position_embeddings": (1 << 32) - 1,
    "block_size": 1 << 20,
}
"""Keys of a ``config.json``: whole numbers, from 1 or, of experts, from 0."""
IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
NUMBERS: tuple[str, ...] = (
    "rope_theta",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
    "partial_rotary_factor",
    "routed_scaling_factor",
)
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache")


def check_config(values: dict[str, Any]) -> None:
    """ValueError, one line, for a value in a ``config.json`` that no model has; null is for a missing one."""
    given = {key: value for key, value in values.items() if value is not None}
    for key, most in CONFIG.items():
        low = 0 if "expert" in key else 1
        if key in given and not (type(given[key]) is int and low <= given[key] <= most):
            raise ValueError(f"{key} is {shown(given[key])}, not a whole number from {low} to {most}; restore the file")
    for key in IDS:
        ids = given.get(key, [])
        for index in ids if isinstance(ids, list) else [ids]:
            if type(index) is not int or not 0 <= index < MOST_IDS:
                raise ValueError(f"{key} is {shown(index)}, not a token id from 0 to {MOST_IDS - 1}; restore the file")
    for key in NUMBERS:
        if key in given and not (type(given[key]) in (int, float) and 0 <= given[key] <= MOST_NUMBER):
            raise ValueError(f"{key} is {shown(given[key])}, not a number from 0 to {MOST_NUMBER:g}; restore the file")
    wrong = [key for key in FLAGS if type(given.get(key, True)) is not bool]
    wrong += [key for key in ("rope_scaling", "rope_parameters") if not isinstance(given.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {shown(given[wrong[0]])}, which no model has; restore the file")


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Of a ``config.json``'s values, those that are numbers, lists of them, true, false, null or one word: no path, and
    nothing nested.
    """
    return {key: value for key, value in values.items() if all(map(_is_plain, _items(value)))}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | None) or (isinstance(value, str) and value.isidentifier())


def shown(value: object) -> str:
    """The start of a value, for a message."""
    return repr(value)[:20]


def short(value: object) -> str:
    """A value for a message; of a long one, such as a fingerprint, the beginning."""
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def check_id(where: str, token: str, index: object) -> None:
    """ValueError, one line, for a token's id that no vocabulary has."""
    if type(index) is not int or not 0 <= index < MOST_IDS:
        found = f"token {token[:40]!r} has id {str(index)[:20]}"
        raise ValueError(f"{where}: {found}, not one of 0 to {MOST_IDS - 1}; restore the file")
