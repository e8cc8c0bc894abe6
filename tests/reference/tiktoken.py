"""tiktoken's encoding by definition: merge the neighbours whose joined bytes rank lowest, while some have a rank."""

import base64
import unicodedata
from pathlib import Path

import regex


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def encode(text: str, ranks: dict[bytes, int], pattern: str) -> list[int]:
    """Ids of ``text`` under NFC normalisation."""
    ids: list[int] = []
    for word in regex.findall(pattern, unicodedata.normalize("NFC", text)):
        ids.extend(_encode_word(word.encode("utf-8"), ranks))
    return ids


def _encode_word(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        pairs = [ranks.get(left + right) for left, right in zip(parts, parts[1:])]  # noqa: RUF007
        lowest = min((rank for rank in pairs if rank is not None), default=None)
        if lowest is None:
            break
        place = pairs.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[part] for part in parts]
