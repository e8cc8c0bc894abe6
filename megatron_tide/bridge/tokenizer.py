"""One interface to every tokenizer: ids, bytes per token, special ids, chat template, fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from megatron_tide.bounds import check_id
from megatron_tide.bridge import template
from megatron_tide.bridge.byte_table import ByteTable
from megatron_tide.bridge.chat import LeftOut, Rendered, check_said, render_guarded
from megatron_tide.bridge.codecs import Codec
from megatron_tide.bridge.tokenizer_files import check_own

ROLES = ("mask", "eos", "pad")
_SHAPES = 1000  # conversations by their roles, of which a tokenizer remembers what its template writes


@dataclass(frozen=True)
class Encoding:
    """A text's tokens: ``ids`` int32 [n], ``lengths`` int64 [n] in bytes, ``data`` their concatenated bytes."""

    ids: np.ndarray
    lengths: np.ndarray
    data: bytes


_ROLES = ("system", "user", "assistant", "tool", "developer", "function")
_WORDS = re.compile(r"\.(\w+)|'(\w+)'|\"(\w+)\"")  # fields that a template reads, and strings that it compares with
_CHANGING = re.compile(
    r"\b(strftime_now|lipsum)\b|(\||\bfilter\b|\bmap\s*\(\s*['\"])\s*random\b"
)  # of Jinja's names, those without a fixed value


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """A tokenizer's origin and the files next to its vocabulary: enough to load, save or describe it again."""

    name: str
    path: Path
    files: tuple[Path, ...]
    roles: Mapping[str, str]
    """Role (mask, eos, pad, bos, ...) -> the token's string."""
    chat_template: str | None
    again: Callable[[], TextTokenizer]
    """Loads the same tokenizer again; it can be pickled and replaces the tokenizer on the way to another process."""
    raw: Any = None


class TextTokenizer:
    """A tokenizer of any supported kind (see ``load_tokenizer``)."""

    def __init__(self, codec: Codec, source: TokenizerSource) -> None:
        self._codec = codec
        self._source = source
        self._table = ByteTable(codec.token_bytes)
        self._forbidden = np.zeros(len(self._table), dtype=bool)
        self._forbidden[[index for index in codec.special.values() if index != codec.unknown]] = True
        ids = {token: index for index, token in enumerate(codec.strings) if token is not None}
        self._roles = {role: ids[token] for role, token in source.roles.items() if token in ids}
        mask = source.roles.get("mask", "")
        if mask.isdecimal():
            self._roles["mask"] = self._unused(int(mask))
        self._roles.setdefault("pad", self._roles.get("eos", -1))
        probes = [self._table.encode_with_bytes(np.array(codec.encode(one), np.int32)) for one in ("a", " a", "a ")]
        self._prefixes, self._suffixes = probes[0].startswith(b" "), probes[0].endswith(b" ")
        self._prefixes_always, self._suffixes_always = probes[1].startswith(b"  "), probes[2].endswith(b"  ")
        self._fingerprint: str | None = None
        self._shapes: dict[str, str] = {}
        self._changing = _CHANGING.search(source.chat_template or "")
        self._known = {*_ROLES, *(word for words in _WORDS.findall(source.chat_template or "") for word in words)}
        ends = template.MARKS_OF_THOUGHTS.values()
        self._known |= {end for end in ends if end in (source.chat_template or "")}

    def __repr__(self) -> str:
        return f"TextTokenizer({self.name!r}, {self.vocab_size} tokens, {self.fingerprint[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._source.again, ()

    @property
    def name(self) -> str:
        """The name the user gave: a folder, a file or a hub name."""
        return self._source.name

    @property
    def path(self) -> Path:
        """The folder or file it was read from (for a hub name, the downloaded snapshot)."""
        return self._source.path

    @property
    def raw(self) -> Any:
        """The wrapped transformers tokenizer, or None for SentencePiece."""
        return self._source.raw

    @property
    def vocab_size(self) -> int:
        """Number of ids, holes and added tokens included: the largest id plus one."""
        return len(self._table)

    @property
    def mask_id(self) -> int:
        """Id of the mask token; ValueError if the tokenizer has none."""
        return self._role("mask", "pass its string as the mask token, or add <|mask|> to the tokenizer")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a response; ValueError if the tokenizer has none."""
        return self._role("eos", "name an eos_token in its tokenizer_config.json")

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch: the pad token, or the end-of-response token where there is none."""
        return self._role("pad", "name a pad_token or an eos_token in its tokenizer_config.json")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that ordinary text never becomes (except the unknown token, which stands for text)."""
        return frozenset(self._codec.special.values())

    @property
    def fingerprint(self) -> str:
        """sha256 hex of everything that affects ids: vocabulary, merges or scores, splitting, added tokens and more."""
        if self._fingerprint is None:
            content = {
                "core": self._codec.core,
                "added": self._codec.added,
                "special": sorted(self._codec.special.items()),
                **({"flags": self._codec.flags} if self._codec.flags else {}),
            }
            self._fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()
        return self._fingerprint

    @property
    def template_fingerprint(self) -> str | None:
        """sha256 hex of the chat template and of the tokens that it writes by role (``{{ bos_token }}``); None without
        a template. It affects a prompt's ids, not a response's.
        """
        source = self._source.chat_template
        if source is None:
            return None
        tokens = {name: token for name, token in sorted(self._role_tokens().items()) if name in source}
        return hashlib.sha256((source + (json.dumps(tokens) if tokens else "")).encode("utf-8")).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The manifest entry: name, fingerprint, vocab_size, ids of mask, eos and pad (None if missing)."""
        ids = {f"{role}_id": index if (index := self._roles.get(role, -1)) >= 0 else None for role in ROLES}
        return {"name": self.name, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size, **ids}

    def encode(self, text: str, *, rest: bool = False) -> np.ndarray:
        """Ids int32 [n] of ordinary text; a special token's string in it is encoded as text; no special token is
        added. ``rest``: it goes on after other tokens, so no space is written before it.
        """
        encode = self._codec.encode_rest if rest else self._codec.encode
        return self._without_special(encode(_checked(text)))

    def encode_within(self, text: str, *, rest: bool) -> np.ndarray:
        """``encode`` of text that other tokens follow: with the spaces at its ends, where the tokenizer has them."""
        prefixed = not rest and (self._prefixes_always or (self._prefixes and not text.startswith(" ")))

        def lost(ids: np.ndarray) -> tuple[bool, int]:
            data = self._table.encode_with_bytes(ids).removeprefix(b" " if prefixed else b"")
            return data != text.encode(), abs(len(data) - len(text.encode()))

        within = self._without_special(self._codec.encode_within(text, rest))
        return min(self.encode(text, rest=rest), within, key=lost)

    def encode_prompt(self, rendered: str) -> np.ndarray:
        """Ids int32 [n] of text a template rendered: special tokens' strings become those tokens, none is added.

        In what ``render`` returns, only those of the template do; the text of messages stays text.
        """
        _checked(rendered)
        content = rendered.content if isinstance(rendered, Rendered) else ()
        if not content:
            return np.array(self._codec.encode_prompt(rendered), dtype=np.int32)
        parts = self._codec.prompt_parts(str(rendered), content)
        return np.concatenate([self._without_special(ids) if text else np.array(ids, np.int32) for ids, text in parts])

    def reads_like_control(self, text: str) -> bool:
        """Whether ``encode_prompt`` makes a special token of a part of ``text``."""
        return bool(self._codec.controls(text))

    def _without_special(self, found: list[int]) -> np.ndarray:
        ids = np.array(found, dtype=np.int32)
        if self._forbidden[ids].any():
            string = self._codec.strings[int(ids[self._forbidden[ids]][0])]
            raise ValueError(f"{self.name}: {string!r} in the text became a special token; remove it from the text")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD. Special tokens are omitted, or shown as their
        strings.
        """
        # Ids past the vocabulary exist in models (padded embeddings) and have no bytes.
        known = [int(index) for index in ids if 0 <= index < self.vocab_size]
        token_bytes = self.token_bytes(known)
        if not skip_special:
            strings = {index: token.encode("utf-8") for token, index in self._codec.special.items()}
            token_bytes = [strings.get(index, piece) for index, piece in zip(known, token_bytes)]
        return b"".join(token_bytes).decode("utf-8", errors="replace")

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """The bytes of each token in this sequence: joined, the text's bytes. Special tokens have none.

        A tokenizer that writes a space before every text (SentencePiece's dummy prefix), or behind it, has it taken
        off the first token, or the last one that has bytes.
        """
        token_bytes = [self._table.of(int(index)) or b"" for index in ids]
        if token_bytes and self._prefixes:
            token_bytes[0] = token_bytes[0].removeprefix(b" ")
        if self._suffixes:
            last = next((place for place in reversed(range(len(token_bytes))) if token_bytes[place]), None)
            token_bytes = [one.removesuffix(b" ") if n == last else one for n, one in enumerate(token_bytes)]
        return token_bytes

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n] byte lengths of a complete encoded text's tokens, as ``token_bytes`` has them; no loop."""
        lengths = self._table.lengths(ids)
        if len(ids) and self._prefixes and self._starts_with_space(ids):
            lengths[0] -= 1
        if len(ids) and self._suffixes:
            lengths[-1] -= (self._table.of(int(ids[-1])) or b"").endswith(b" ")
        return lengths.astype(np.int32)

    def id_to_bytes(self, token: int) -> bytes | None:
        """Bytes of one id, independent of its position; None for special, unknown and missing ids."""
        return self._table.of(token) if 0 <= token < self.vocab_size else None

    def id_to_token(self, token: int) -> str | None:
        """The vocabulary's own string of one id; None for a missing id."""
        return self._codec.strings[token] if 0 <= token < self.vocab_size else None

    def is_ordinary(self) -> np.ndarray:
        """Bool [V]: ids of the model's own vocabulary that have bytes (no special, unknown or missing ones)."""
        ordinary = self._table.known.copy()
        ordinary[list(self._codec.beside)] = False
        return ordinary

    def may_be_mask(self, index: int) -> bool:
        """Whether an id is no text: of vocabularies' own tokens only those that are added too, as unused ones are."""
        return not self.is_ordinary()[index] or index in self._codec.added.values()

    def encode_with_bytes(self, text: str) -> Encoding:
        """Encode ordinary text; the tokens' bytes equal the text's unless the tokenizer normalised it."""
        return self._with_bytes(self.encode(text), text)

    def spelled(self, ids: np.ndarray, text: str) -> Encoding | None:
        """``ids`` (int32 [n]) as the tokens of ``text``, which ``encode`` might split otherwise; None where they do not
        spell it, byte for byte, or are no text alone.
        """
        if ((ids < 0) | (ids >= self.vocab_size)).any() or not self.is_ordinary()[ids].all():
            return None
        found = self._with_bytes(ids, text)
        return found if found.data == text.encode("utf-8", "surrogatepass") else None

    def _with_bytes(self, ids: np.ndarray, text: str) -> Encoding:
        lengths, data = self._table.lengths(ids), self._table.encode_with_bytes(ids)
        prefixed = self._prefixes_always or (self._prefixes and not text.startswith(" "))
        if len(ids) and prefixed and self._starts_with_space(ids):
            lengths[0] -= 1
            data = data[1:]
        if (self._suffixes_always or (self._suffixes and not text.endswith(" "))) and data.endswith(b" "):
            lengths[-1] -= 1
            data = data[:-1]
        return Encoding(ids, lengths, data)

    def spans(self, text: str) -> np.ndarray:
        """int64 [n, 2]: the first byte, and the one past the last, of the part of ``text`` that each token of
        ``encode(text)`` stands for; both non-decreasing. Tokens that share a letter all have the whole letter.
        """
        starts, ends = self._codec.spans(_checked(text)).T
        starts = np.minimum.accumulate(starts[::-1])[::-1]
        return np.stack([starts, np.maximum.accumulate(ends)], axis=1)

    def has_no_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Bool [n]: tokens without bytes, such as the unknown token."""
        return ~self._table.known[ids]

    def render(
        self, messages: Iterable[dict[str, Any]], add_generation_prompt: bool = True, *, start: str = "", **names: Any
    ) -> Rendered:
        """The conversation rendered by the chat template, ``start`` of an answer behind it; for ``encode_prompt``.

        The template also sees ``names``, and ``tools`` of the first message. ValueError without a template or where it
        refuses, LeftOut where it does not write all that the messages say.
        """
        said = list(messages)
        options = {**names, "add_generation_prompt": add_generation_prompt}
        return self._guarded(said, self._write(options, said), options) + start

    def render_all(self, conversations: Sequence[list[Any]]) -> list[Rendered | ValueError]:
        """``render`` of each conversation up to its answer, in less time; its error in place of a text."""
        options = {"add_generation_prompt": True}
        seen = [(messages, self._names(options, messages)) for messages in conversations]
        found: list[Rendered | ValueError] = []
        for messages, text in zip(conversations, template.render_all(self._template(), seen)):
            try:
                plain = text if isinstance(text, str) else self._refuse(text)
                found.append(self._guarded(messages, plain, options))
            except ValueError as error:
                found.append(error)
        return found

    def _guarded(self, messages: list[Any], plain: str, options: Mapping[str, Any]) -> Rendered:
        """What ``plain``, the rendered ``messages``, has of their text; LeftOut if that is not all of it."""
        try:
            rendered = render_guarded(messages, plain, partial(self._write, options), self._codec, self._known)
            check_said(messages, rendered, partial(self._show, options), self._known)
        except RecursionError:
            raise ValueError(f"{self.name}: the conversation is nested too deeply for its chat template") from None
        except LeftOut as error:
            raise LeftOut(f"{self.name}: {error}; use a template that writes it, or omit the row") from None
        return rendered

    def _template(self) -> str:
        if self._source.chat_template is None:
            raise ValueError(f"{self.name}: the tokenizer has no chat template; put a chat_template.jinja next to it")
        if self._changing is not None:
            raise ValueError(
                f"{self.name}: the chat template writes today's date or a random choice ({self._changing[0]}), so "
                "equal settings give other prompts tomorrow; put a chat_template.jinja with a fixed text beside it"
            )
        return self._source.chat_template

    def _show(self, options: Mapping[str, Any], marks: list[Any]) -> str:
        """``_write`` for a conversation of marks: there are few that differ."""
        key = f"{options} {marks}"
        if key not in self._shapes:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._write(options, marks)
        return self._shapes[key]

    def _write(self, options: Mapping[str, Any], messages: list[Any]) -> str:
        source = self._template()
        try:
            return template.render(source, messages, **self._names(options, messages))
        except ValueError as error:
            return self._refuse(error)

    def _refuse(self, error: ValueError) -> NoReturn:
        if isinstance(error, template.TemplateLimit):
            raise template.TemplateLimit(f"{self.name}: the chat template does not end: {error}") from None
        raise ValueError(f"{self.name}: the chat template rejects the conversation: {error}") from None

    def _names(self, options: Mapping[str, Any], messages: list[Any]) -> dict[str, Any]:
        """What the template sees beside the messages."""
        tools = messages[0].get("tools") if messages and isinstance(messages[0], dict) else None
        return {**options, **self._role_tokens(), **({"tools": tools} if tools else {})}

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into ``folder``: copies, or the Hugging Face form of a tiktoken file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._source.files:
            self.raw.save_pretrained(folder)
        for file in self._source.files:
            check_own(file)
            shutil.copyfile(file, folder / file.name)

    def _role_tokens(self) -> dict[str, str]:
        """The names that a chat template may write tokens by, such as ``eos_token``."""
        return {f"{role}_token": token for role, token in self._source.roles.items()}

    def _starts_with_space(self, ids: np.ndarray) -> bool:
        return (self._table.of(int(ids[0])) or b"")[:1] == b" "

    def _unused(self, index: int) -> int:
        check_id(self.name, "of the mask", index)
        if index < len(self._table) and not self.may_be_mask(index):
            raise ValueError(
                f"{self.name}: id {index} is a text token, so it cannot be the mask; give another id or a token"
            )
        return index

    def _role(self, role: str, hint: str) -> int:
        index = self._roles.get(role, -1)
        if index < 0:
            raise ValueError(f"{self.name}: the tokenizer has no {role} token; {hint}")
        return index


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair at character {error.start}, which cannot be encoded; fix the data"
        ) from error
    return text
