"""Two tokenizer engines behind one interface: Hugging Face ``tokenizers`` and SentencePiece.

``encode`` takes ordinary text: the string of a special token in it is encoded like any other text. ``encode_prompt``
takes text that a chat template rendered: there the same strings become the special tokens, but for those that
``prompt_parts`` is told are message text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from megatron_tide.bounds import check_id
from megatron_tide.bridge.byte_table import METASPACE, byte_level_bytes, metaspace_bytes
from megatron_tide.bridge.chat import BLANK, Range, blank
from megatron_tide.bridge.edges import Edges

# <|im_end|>, <|mask|> and their full-width cousins: markers of a chat format even where the vocabulary file does not
# call them special. Text that contains one must not open a turn or become a mask.
MARKER = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_IMPOSSIBLE_SCORE = -1e9
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class Codec(Protocol):
    """Text -> ids, and properties of each of the V ids."""

    strings: list[str | None]
    """[V] vocabulary strings, None for ids that do not exist."""
    token_bytes: list[bytes | None]
    """[V] bytes of each id; None for special, unknown and missing ids."""
    added: dict[str, int]
    """Tokens added to the model's own vocabulary, special or not."""
    beside: set[int]
    """Ids of those that its own vocabulary does not have as well, as some have their runs of spaces."""
    flags: dict[str, list[str]]
    """Of added tokens: how a text around them changes what they are found in (lstrip, ...), where it does."""
    special: dict[str, int]
    """Tokens that ordinary text never becomes."""
    unknown: int | None
    """Id of the unknown token: the one special token that ordinary text may become."""
    core: str
    """sha256 hex of all that decides ordinary text's ids, except the added tokens."""

    def encode(self, text: str) -> list[int]: ...

    def encode_rest(self, text: str) -> list[int]: ...

    def encode_within(self, text: str, rest: bool) -> list[int]: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def controls(self, text: str) -> list[Range]: ...

    def edges(self, text: str) -> list[Range]: ...

    def prompt_parts(self, text: str, content: Sequence[Range]) -> Iterator[tuple[list[int], bool]]: ...

    def spans(self, text: str) -> np.ndarray: ...


class FastCodec:
    """A ``tokenizers.Tokenizer`` (tokenizer.json): byte-level, or SentencePiece turned into that format.

    ``named`` are strings with a role (mask, end of text, ...), or that the chat template writes around messages:
    special even if the file does not mark them. ValueError
    for a kind of tokenizer that does not keep the text's bytes (WordPiece, characters without byte fallback are refused
    or appear as unaligned text).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, named: Iterable[str]) -> None:
        # A copy: transformers sets truncation and padding on the tokenizer it wraps.
        self._prompt = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._prompt.no_truncation()
        self._prompt.no_padding()
        spec = json.loads(self._prompt.to_str())
        if spec["model"].get("dropout"):
            raise ValueError("tokenizer.json has dropout, so a text has other ids each time; set it to null there")
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        for token, index in vocabulary.items():
            check_id("its vocabulary", token, index)
        self.strings: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            self.strings[index] = token
        self.added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.beside = {*self.added.values()} - {*tokenizer.get_vocab(with_added_tokens=False).values()}
        flags = {token["content"]: [flag for flag in _FLAGS if token.get(flag)] for token in spec["added_tokens"]}
        self.flags = {token: found for token, found in flags.items() if found}
        marked = {token["content"] for token in spec["added_tokens"] if token["special"]}
        marked |= {token for token in self.added if MARKER.fullmatch(token)} | set(named)
        self.special = {token: vocabulary[token] for token in marked if token in vocabulary}
        unknown = spec["model"].get("unk_token")
        if unknown is None and spec["model"].get("unk_id") is not None:
            unknown = self.strings[spec["model"]["unk_id"]]
        self.unknown = vocabulary.get(unknown)
        self.token_bytes = self._spell(_scheme(spec))
        self._text = _text_only(spec, self.special)
        self._prefix_once = '"prepend_scheme": "first"' in json.dumps(spec["pre_tokenizer"])
        forms = {*self.special, *map(self._normal, self.special)}
        # By their first letters: some vocabularies have 100,000 numbered special tokens.
        self._control, self._edges = _any_of({form[:4] for form in forms}), Edges(forms)
        read = ["normalizer", "pre_tokenizer", "model"]
        if "ByteLevel" in {*_kinds(spec.get("decoder"))} - {*_kinds(spec.get("pre_tokenizer"))}:
            read.append("decoder")  # it alone says which bytes a token has
        respelled = sorted(n for token, n in self.added.items() if self.token_bytes[n] not in (None, token.encode()))
        self.core = _digest({key: spec[key] for key in read} | ({"respelled": respelled} if respelled else {}))

    def encode(self, text: str) -> list[int]:
        return _encode(self._text, text).ids

    def spans(self, text: str) -> np.ndarray:
        """int64 [n, 2]: the bytes of ``text`` that each token of ``encode(text)`` stands for, as the library has it."""
        sizes = np.fromiter((len(letter.encode()) for letter in text), np.int64, len(text))
        found = _encode(self._text, text).offsets
        return np.concatenate([[0], np.cumsum(sizes)])[np.array(found, np.int64).reshape(-1, 2)]

    def encode_prompt(self, text: str) -> list[int]:
        return _encode(self._prompt, text).ids

    def encode_rest(self, text: str) -> list[int]:
        """Ordinary text that goes on after other tokens: without the space that some write before a text."""
        return _encode(self._rest, text).ids

    def encode_within(self, text: str, rest: bool) -> list[int]:
        """Ordinary text, tokens behind it (``rest``: and before it): with the spaces at such an end, which a tokenizer
        may drop or add at that of a text. A token that is also of what stands beside it is left out.
        """
        before = BLANK if rest else ""
        found, stop = _encode(self._text, before + text + BLANK), len(before + text)
        return [one for one, (start, end) in zip(found.ids, found.offsets) if len(before) <= start and end <= stop]

    def controls(self, text: str) -> list[Range]:
        """The ranges of ``text`` that ``encode_prompt`` makes special tokens of."""
        if not self._control or not (self._control.search(text) or self._control.search(self._normal(text))):
            return []
        encoded = _encode(self._prompt, text)
        # Without the spaces around that a token may take.
        ranges = [(start, text[start:stop]) for _, start, stop in self._found(text, encoded)]
        return [(at + len(own) - len(own.lstrip()), at + len(own.rstrip())) for at, own in ranges if own.strip()]

    def edges(self, text: str) -> list[Range]:
        """The first and the last letter of ``text``, where it may be part of a special token with text beside it."""
        return self._edges.of(text, self._normal)

    def _normal(self, text: str) -> str:
        normalizer = self._prompt.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def prompt_parts(self, text: str, content: Sequence[Range]) -> Iterator[tuple[list[int], bool]]:
        """Ids of a prompt, part by part, and whether a part was encoded as text: those with ``content``, ranges of
        message text that is in no special token.
        """
        shown = blank(text, content)
        encoded = _encode(self._prompt, shown)
        tokens = self._found(shown, encoded)
        token = place = 0
        for number, start, stop in [*tokens, (len(encoded.ids), len(text), len(text))]:
            if _overlap((place, start), content):
                as_text = self.encode_rest if place and self._prefix_once else self.encode
                yield as_text(text[place:start]), True
            else:
                yield encoded.ids[token:number], False
            yield encoded.ids[number : number + 1], False
            token, place = number + 1, stop

    def _found(self, text: str, encoded: tokenizers.Encoding) -> list[tuple[int, int, int]]:
        """(place, start, stop) of the special tokens; a letter that became the unknown token is none."""
        ids = set(self.special.values())
        found = [(n, *span) for n, (index, span) in enumerate(zip(encoded.ids, encoded.offsets)) if index in ids]
        unknown = None if self.unknown is None else self.strings[self.unknown]
        return [one for one in found if encoded.ids[one[0]] != self.unknown or text[one[1] : one[2]].strip() == unknown]

    @cached_property
    def _rest(self) -> tokenizers.Tokenizer:
        spec = json.loads(self._text.to_str())
        spec |= {key: _unprefixed(spec[key]) for key in ("normalizer", "pre_tokenizer")}
        return _text_only(spec, self.special)

    def _spell(self, scheme: Any) -> list[bytes | None]:
        silent = {*self.special.values(), self.unknown}
        token_bytes = [None if token is None else scheme(token) for token in self.strings]
        for token, index in self.added.items():
            if index in self.beside or token_bytes[index] is None:
                token_bytes[index] = token.encode("utf-8")
        return [None if index in silent else piece for index, piece in enumerate(token_bytes)]


class SentencePieceCodec:
    """A SentencePiece model, with ``added`` tokens (string -> id) on top of or inside its vocabulary.

    Control pieces, added tokens and those in ``named`` are special. SentencePiece makes no control piece from text, but
    does make user-defined pieces; where a special one stands in a text, the text is encoded in two stretches that part
    it. Special tokens are looked for in prompts only. In a prompt, each stretch between them is encoded as a text of
    its own.
    """

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, added: Mapping[str, int], named: Iterable[str]
    ) -> None:
        self._processor = processor
        self._suffixes = [*processor.encode("a", out_type=str), ""][-2].endswith(METASPACE)
        size = self._processor.get_piece_size()
        self.strings: list[str | None] = [self._processor.id_to_piece(index) for index in range(size)]
        self.strings += [None] * (max(added.values(), default=-1) + 1 - size)
        for token, index in added.items():
            self.strings[index] = token
        unknown = self._processor.unk_id()
        self.unknown: int | None = unknown if unknown >= 0 else None
        ids = {token: index for index, token in enumerate(self.strings) if token is not None}
        silent = {index for index in range(size) if processor.is_control(index) or processor.is_unused(index)}
        silent |= {ids[token] for token in named if token in ids} | {unknown, *added.values()}
        self.added, self.beside = dict(added), {*added.values()}
        self.flags: dict[str, list[str]] = {}
        self.special = {token: index for token, index in ids.items() if index in silent}
        self.token_bytes = [
            None if token is None or index in silent else metaspace_bytes(token)
            for index, token in enumerate(self.strings)
        ]
        self._control = _any_of(self.special)
        eager = (token for token, index in self.special.items() if len(token) > 1 and index in processor.encode(token))
        self._eager = _any_of(eager)
        self._made = {*self.special.values()} - {self.unknown}
        self._edges = Edges(self.special)
        self.core = hashlib.sha256(processor.serialized_model_proto()).hexdigest()

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._processor.encode(text)
        if self._eager is None or self._made.isdisjoint(found):
            return found
        return [index for index, _, _ in self._pieces(text)]

    def spans(self, text: str) -> np.ndarray:
        """int64 [n, 2]: the bytes of ``text`` that each token of ``encode(text)`` stands for, as the library has it."""
        return np.array([(start, stop) for _, start, stop in self._pieces(text)], np.int64).reshape(-1, 2)

    def encode_rest(self, text: str) -> list[int]:
        """Ordinary text that goes on after other tokens: without the space that some write before a text."""
        return [index for index, _, _ in self._pieces(text, BLANK)]

    def encode_within(self, text: str, rest: bool) -> list[int]:
        """Ordinary text, tokens behind it (``rest``: and before it): with the spaces at such an end, which some drop
        or add at that of a text.
        """
        return [index for index, _, _ in self._pieces(text, BLANK if rest else "", BLANK)]

    def _pieces(self, text: str, before: str = "", after: str = "") -> Iterator[tuple[int, int, int]]:
        """Id and bytes in ``text`` of each token; ``before`` is encoded with its first stretch, ``after`` with the
        last one, and both are then left out.
        """
        place, stretches = 0, [*self._stretches(text)]
        for number, stretch in enumerate(stretches):
            behind = after if number == len(stretches) - 1 else BLANK if self._suffixes else ""
            pieces = self._processor.encode(before + stretch + behind, return_type="proto").pieces
            size, stop = len(before.encode()), len((before + stretch).encode())
            own = (n for n, piece in enumerate(pieces) if piece.begin >= size or piece.end > size)
            end = next((n for n, piece in enumerate(pieces) if behind and piece.begin >= stop), len(pieces))
            for piece in pieces[next(own, len(pieces)) if before else 0 : end]:
                yield piece.id, place + piece.begin - size, place + min(piece.end, stop) - size
            before, place = BLANK, place + len(stretch.encode())

    def _stretches(self, text: str) -> Iterator[str]:
        """``text``, cut behind the first letter of every special token that the library would make of it."""
        start = 0
        while self._eager and (found := self._eager.search(text, start)):
            yield from self._parted(text[start : found.start() + 1])
            start = found.start() + 1
        yield from self._parted(text[start:])

    def _parted(self, stretch: str) -> Iterator[str]:
        """``stretch``, cut likewise where it spells a special token only once it is normalised (full width)."""
        if self._eager is None or self._made.isdisjoint(self._processor.encode(stretch)):
            yield stretch
            return
        data, pieces = stretch.encode(), self._processor.encode(stretch, return_type="proto").pieces
        cuts = [len(data[: piece.begin].decode()) + 1 for piece in pieces if piece.id in self._made]
        parts = [stretch[start:stop] for start, stop in pairwise([0, *cuts, len(stretch)]) if start < stop]
        if len(parts) == 1:
            yield stretch
            return
        for part in parts:
            yield from self._parted(part)

    def encode_prompt(self, text: str) -> list[int]:
        return [index for ids, _ in self.prompt_parts(text, ()) for index in ids]

    def controls(self, text: str) -> list[Range]:
        """The ranges of ``text`` that ``encode_prompt`` makes special tokens of."""
        return [found.span() for found in self._control.finditer(text)] if self._control else []

    def edges(self, text: str) -> list[Range]:
        """The first and the last letter of ``text``, where it may be part of a special token with text beside it."""
        return self._edges.of(text)

    def prompt_parts(self, text: str, content: Sequence[Range]) -> Iterator[tuple[list[int], bool]]:
        """Ids of a prompt, part by part, and whether a part was encoded as text; ``content``: ranges of message text
        that is in no special token.
        """
        place = 0
        for start, stop in self.controls(blank(text, content)):
            yield self.encode(text[place:start]), True
            yield [self.special[text[start:stop]]], False
            place = stop
        yield self.encode(text[place:]), True


def sentencepiece_roles(processor: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """Role -> string, for the roles that a SentencePiece model defines itself."""
    ids = {"eos": processor.eos_id(), "pad": processor.pad_id(), "bos": processor.bos_id()}
    return {role: processor.id_to_piece(index) for role, index in ids.items() if index >= 0}


def _scheme(spec: Mapping[str, Any]) -> Any:
    """The way this tokenizer.json writes bytes as strings, according to its decoder (or pre-tokenizer, without one)."""
    kinds = set(_kinds(spec.get("decoder"))) | set(_kinds(spec.get("pre_tokenizer")))
    if spec["model"]["type"] == "WordPiece" or "WordPiece" in kinds:
        raise ValueError("a WordPiece tokenizer does not keep the text's bytes; use a byte-level or SentencePiece one")
    for name in ("end_of_word_suffix", "continuing_subword_prefix"):
        if mark := spec["model"].get(name):
            raise ValueError(f"its tokens have {mark!r} for a part of a word ({name}), which is no text; use another")
    if "ByteLevel" in kinds:
        return byte_level_bytes
    byte_fallback = bool(spec["model"].get("byte_fallback"))
    if "Metaspace" in kinds or "Replace" in kinds:
        return metaspace_bytes if byte_fallback else lambda token: token.replace(METASPACE, " ").encode("utf-8")
    raise ValueError(
        "the tokenizer is neither byte-level nor SentencePiece-like, so its tokens cannot be turned into bytes"
    )


def _kinds(component: Any) -> Iterable[str]:
    if isinstance(component, Mapping):
        yield component["type"]
        for name in ("decoders", "pretokenizers"):
            for part in component.get(name, ()):
                yield from _kinds(part)


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """ValueError where the library panics, which is no Exception in Python (ten million spaces are enough)."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer fails on a text of {len(text)} characters ({error})") from None


def _any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    # Longest first: <|mask|> must win over a shorter token that starts it.
    found = sorted(filter(None, strings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def _overlap(span: Range, ranges: Sequence[Range]) -> bool:
    return any(start < span[1] and span[0] < stop for start, stop in ranges)


def _unprefixed(component: Any) -> Any:
    """A normalizer or pre-tokenizer that writes no space before a text."""
    if isinstance(component, list):
        return [_unprefixed(part) for part in component]
    if not isinstance(component, dict):
        return component
    if component.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    silent = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: silent.get(key, _unprefixed(value)) for key, value in component.items()}


def _text_only(spec: Mapping[str, Any], special: Mapping[str, int]) -> tokenizers.Tokenizer:
    """A copy that never makes a special token from text."""
    added = [{**t, "special": t["content"] in special} for t in spec["added_tokens"]]
    spec = {**spec, "added_tokens": added, "post_processor": None}  # without special tokens, one only cuts offsets
    if spec["model"]["type"] == "Unigram":
        # Even if it is not recognised as special, a special token's string can be an ordinary vocabulary piece.
        vocabulary = [[t, _IMPOSSIBLE_SCORE if t in special else score] for t, score in spec["model"]["vocab"]]
        spec["model"] = {**spec["model"], "vocab": vocabulary}
    copy = tokenizers.Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    return copy


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode("ascii")).hexdigest()
