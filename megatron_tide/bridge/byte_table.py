"""The bytes of each token: one table per tokenizer, so that a sequence's byte lengths are one numpy gather.

Vocabularies represent bytes as strings in two ways. Byte-level vocabularies (GPT-2 and its successors) write every
byte as one printable character; SentencePiece vocabularies write text with ``\u2581`` for the space and ``<0xE2>`` for
a lone byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

METASPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable Latin-1 is itself, the rest from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(hidden)})
    return alphabet


_ALPHABET = byte_alphabet()
_LETTER = {byte: char for char, byte in _ALPHABET.items()}


def byte_level_bytes(token: str) -> bytes | None:
    """Bytes of a byte-level vocabulary string; None if a character is outside the alphabet."""
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:
        return None


def byte_level_string(data: bytes) -> str:
    """The byte-level vocabulary string of ``data``."""
    return "".join(_LETTER[byte] for byte in data)


def metaspace_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece vocabulary string: a ``<0xE2>`` piece is one byte, ``\u2581`` is a space."""
    if is_byte_piece(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(METASPACE, " ").encode("utf-8", errors="surrogatepass")


def is_byte_piece(token: str) -> bool:
    """Whether the vocabulary string is a byte-fallback piece such as ``<0xE2>``."""
    return _BYTE_PIECE.fullmatch(token) is not None


class ByteTable:
    """Token id -> bytes, for V ids at once. None (a special, missing or unknown token) has length 0."""

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        self.known = np.array([piece is not None for piece in token_bytes], dtype=bool)
        self.length = np.array([len(piece or b"") for piece in token_bytes], dtype=np.int64)
        self._flat = np.frombuffer(b"".join(piece or b"" for piece in token_bytes), dtype=np.uint8)
        self._start = np.cumsum(self.length) - self.length

    def __len__(self) -> int:
        return len(self.length)

    def of(self, token: int) -> bytes | None:
        """Bytes of one id, or None."""
        if not self.known[token]:
            return None
        start = int(self._start[token])
        return self._flat[start : start + int(self.length[token])].tobytes()

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """int64 byte lengths, shape of ``ids``: the type that numpy accumulates and indexes without conversion."""
        return self.length.take(ids)

    def encode_with_bytes(self, ids: np.ndarray) -> bytes:
        """The concatenated bytes of ``ids`` [n], gathered without a loop over tokens."""
        lengths = self.length[ids]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        return self._flat[np.arange(total) + np.repeat(self._start[ids] - ends + lengths, lengths)].tobytes()
