"""The largest sizes that files may state: far above any model of today, and checked before memory is taken for them."""

from __future__ import annotations

from typing import Any

MOST_IDS = 1 << 24
"""Ids of a vocabulary, holes included (the largest public one has 2^18)."""
TOKEN_BYTES = 1 << 12
"""Bytes of one token in a tiktoken file."""
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
    "max_position_embeddings": 1 << 32,
}
"""Keys of a ``config.json``."""


def check_config(values: dict[str, Any]) -> None:
    """ValueError, one line, for a size in a ``config.json`` that no model has."""
    for key, most in CONFIG.items():
        value = values.get(key)
        if isinstance(value, int | float) and not value <= most:
            raise ValueError(f"{key} is {str(value)[:20]}, more than {most}; restore the file")


def check_id(where: str, token: str, index: object) -> None:
    """ValueError, one line, for a token's id that no vocabulary has."""
    if type(index) is not int or not 0 <= index < MOST_IDS:
        found = f"token {token[:40]!r} has id {str(index)[:20]}"
        raise ValueError(f"{where}: {found}, not one of 0 to {MOST_IDS - 1}; restore the file")
