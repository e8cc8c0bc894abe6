"""Conversations -> samples, one each: prompts by each side's template, the response in chunks, EOS fill, truncation.

The response is tokenised on its own, never inside the rendered template, so chunks need no re-decoding and the
template's text is never aligned. The prompt is tokenised exactly as generation will do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tide.bridge import SPOKEN, Aligned, Bridge, EncodedPair, LeftOut, TemplateLimit, TextTokenizer
from megatron_tide.bridge.chat import Rendered
from megatron_tide.data.shard import PROMPT, UNALIGNED, Sample, TokenizedSample
from megatron_tide.tables import AS_WRITTEN, ASSISTANT, MEDIA, Message

NO_ASSISTANT = "no assistant turn"
EMPTY_PROMPT = "nothing before the response"
EMPTY_RESPONSE = "empty response"
NO_ROOM = "no response chunk fits"
NOT_WRITTEN = "a message that the chat template does not write"
MORE_THAN_TEXT = "a response with reasoning, tool calls or a name beside its text"
REFUSED = "refused by a tokenizer or template"

# Of rows into samples, part of a folder's settings. 2: prompts hold message text as text; 3: also where it is joined;
# 4: thoughts that a template leaves out without knowing of them are missed, words behind a respelled space are aligned.
ENCODING = 4

Ids = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """A side's tokenizer, the maximum sequence length in tokens, and the block size to which responses are padded.

    ``needs_mask``: whether the model has to know a mask token; an autoregressive teacher does not.
    """

    tokenizer: TextTokenizer
    length: int
    block: int
    needs_mask: bool = True

    def __post_init__(self) -> None:
        if self.block < 1 or self.length < self.block or self.length % self.block:
            raise ValueError(
                f"length {self.length} is not a multiple of block {self.block} (responses are padded to full blocks); "
                f"use {max(1, self.length // max(1, self.block)) * max(1, self.block)}"
            )

    def describe(self) -> dict[str, Any]:
        """The manifest entry of this side; ValueError if the tokenizer has no EOS, chat template, or mask it needs."""
        tokenizer = self.tokenizer
        tokenizer.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
        return {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "template_fingerprint": tokenizer.template_fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "mask_id": tokenizer.mask_id if self.needs_mask else tokenizer.describe()["mask_id"],
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "length": self.length,
            "block": self.block,
        }


@dataclass(frozen=True)
class Encoded:
    """A sample, whether its response was cut, how many of the complete response's bytes chunks cover, and the sides
    whose tokens stand for another text than the response.
    """

    sample: Sample
    truncated: bool
    covered_bytes: int
    total_bytes: int
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Dropped:
    """Why a row is dropped; ``error``: the message of the tokenizer or template that rejected it."""

    reason: str
    error: str | None = None


@dataclass(frozen=True)
class _Row:
    """A row for student and teacher before its alignment: the prompt's ids by side, the response's tokens, and if they
    are as the student wrote them, the pass that decided each (and the end of text behind them)."""

    key: int
    prompts: Mapping[str, Ids]
    response: EncodedPair
    order: Ids | None


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns conversations into samples. Without teacher and bridge the samples are student-only: nothing is aligned."""

    student: TokenizerSettings
    teacher: TokenizerSettings | None = None
    bridge: Bridge | None = None

    def encode_rows(self, rows: Sequence[tuple[int, list[Message]]]) -> list[Encoded | Dropped]:
        """The sample of each (key, conversation), or why there is none; in order.

        The responses are aligned in one go: ``bridge.TEXTS_AT_ONCE`` rows make good use of it. How rows are grouped
        does not change what comes of them.
        """
        split = [split_response(messages) for _, messages in rows]
        asked = [one[0] for one in split if not isinstance(one, str)]
        sides = {"student": self.student, **({"teacher": self.teacher} if self.teacher and self.bridge else {})}
        prompts = {name: iter(side.tokenizer.render_all(asked)) for name, side in sides.items()}
        read: list[_Row | Encoded | Dropped] = []
        for (key, messages), one in zip(rows, split):
            if isinstance(one, str):
                read.append(Dropped(one))
            else:
                rendered = {name: next(found) for name, found in prompts.items()}
                read.append(self._read(key, rendered, one[1], messages[-1].get(AS_WRITTEN)))
        responses = [row.response for row in read if isinstance(row, _Row)]
        aligned = iter(self.bridge.align(responses) if self.bridge else [])
        return [self._with_teacher(row, next(aligned)) if isinstance(row, _Row) else row for row in read]

    def _read(
        self, key: int, rendered: Mapping[str, Rendered | ValueError], response: str, written: Mapping[str, Any] | None
    ) -> _Row | Encoded | Dropped:
        """All of a row's work before the alignment; of a student-only row, all of its work."""
        try:
            prompts = {name: _prompt(getattr(self, name), text) for name, text in rendered.items()}
            if self.bridge is None or self.teacher is None:
                return _student_only(key, self.student, prompts["student"], response)
            if written is None:
                return _Row(key, prompts, self.bridge.encode_with_bytes(response), None)
            ids, order = (np.array(written[name], np.int32) for name in ("ids", "order"))
            ids = ids[: len(ids) - (ids[-1:] == self.student.tokenizer.eos_id).sum()]
            both = self.bridge.encode_with_bytes(response, ids)
            return _Row(key, prompts, both, order if both.student.ids is ids else None)
        except TemplateLimit:  # of the template, not of the row: each further row would take as long
            raise
        except LeftOut as error:
            return Dropped(NOT_WRITTEN, str(error))
        except (ValueError, RecursionError) as error:  # counted; one odd row stops no mixture
            return Dropped(REFUSED, str(error))

    def _with_teacher(self, row: _Row, aligned: Aligned) -> Encoded | Dropped:
        assert self.teacher is not None
        prompts, response = row.prompts, row.response.text
        settings = {"student": self.student, "teacher": self.teacher}
        ids = {"student": aligned.student_ids, "teacher": aligned.teacher_ids}
        chunk = {"student": aligned.student_chunk, "teacher": aligned.teacher_chunk}
        room = {name: settings[name].length - len(prompts[name]) for name in settings}
        complete = all(len(ids[name]) < room[name] for name in settings)  # one position is for the EOS
        if complete:
            end = aligned.n_chunks
            rest = {"student": UNALIGNED, "teacher": end}  # the teacher's later EOS are masked with the end chunk
            sides = {n: _complete(settings[n], prompts[n], ids[n], chunk[n], end, rest[n]) for n in settings}
            chunks, response_bytes = end + 1, len(response.encode())
        else:
            ends = {name: chunk_ends(chunk[name], aligned.n_chunks) for name in settings}
            chunks = min(int(np.searchsorted(ends[name], room[name], side="right")) for name in settings)
            if not chunks:
                return Dropped(NO_ROOM)
            kept = {name: _kept(chunk[name], chunks, room[name]) for name in settings}
            sides = {n: _cut(prompts[n], ids[n][: kept[n]], chunk[n][: kept[n]]) for n in settings}
            response_bytes = _bytes(self.student, ids["student"], kept["student"])
        sample = Sample(
            key=row.key,
            student=_in_order(sides["student"], row.order),
            teacher=sides["teacher"],
            chunks=chunks,
            response_bytes=response_bytes,
        )
        changed = tuple(name for name in settings if getattr(row.response, name).data != response.encode())
        return Encoded(sample, not complete, aligned.covered_bytes, aligned.total_bytes, changed)


def split_response(messages: list[Message]) -> tuple[list[Message], str] | str:
    """The messages before the last assistant turn and that turn's text; or, as a string, why the row is dropped.

    What follows the last assistant turn is not used. Earlier assistant turns are part of the prompt.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        return NO_ASSISTANT
    prompt, response = messages[: turns[-1]], messages[turns[-1]]["content"]
    if not prompt:
        return EMPTY_PROMPT
    if any(messages[turns[-1]].get(field) for field in (*SPOKEN[1:], *MEDIA)):
        return MORE_THAN_TEXT
    if not response.strip():
        return EMPTY_RESPONSE
    return prompt, response


def _in_order(side: TokenizedSample, order: Ids | None) -> TokenizedSample:
    """With the order of the response's tokens; EOS that the student did not write were decided with the last one."""
    if order is None:
        return side
    every = np.full(len(side.ids), order[-1], np.int32)
    every[: side.prompt] = 0
    written = order[: len(every) - side.prompt]
    every[side.prompt : side.prompt + len(written)] = written
    return replace(side, order=every)


def chunk_ends(chunk: Ids, chunks: int) -> NDArray[np.int64]:
    """One past the last token of every chunk, int64 [chunks], increasing; unaligned tokens belong to none."""
    covered = np.flatnonzero(chunk >= 0)
    ends = np.zeros(chunks, np.int64)
    np.maximum.at(ends, chunk[covered], covered + 1)
    return ends


def _kept(chunk: Ids, chunks: int, room: int) -> int:
    """How many tokens of a cut response fit: its first ``chunks`` chunks, and tokens in no chunk up to the next one."""
    later = np.flatnonzero(chunk >= chunks)
    return min(room, int(later[0]) if len(later) else len(chunk))


def _student_only(key: int, side: TokenizerSettings, prompt: Ids, response: str) -> Encoded | Dropped:
    found = side.tokenizer.encode_with_bytes(response)
    ids, changed = found.ids, found.data != response.encode()
    chunk = np.full(len(ids), UNALIGNED, np.int32)
    room = side.length - len(prompt)
    total = len(response.encode())
    if len(ids) < room:
        student, response_bytes = _complete(side, prompt, ids, chunk, UNALIGNED, UNALIGNED), total
    elif room < 1:
        return Dropped(NO_ROOM)
    else:
        student, response_bytes = _cut(prompt, ids[:room], chunk[:room]), _bytes(side, ids, room)
    sample = Sample(key=key, student=student, teacher=None, chunks=0, response_bytes=response_bytes)
    return Encoded(sample, len(ids) >= room, 0, total, ("student",) if changed else ())


def _prompt(side: TokenizerSettings, rendered: Rendered | ValueError) -> Ids:
    if isinstance(rendered, ValueError):
        raise rendered
    return side.tokenizer.encode_prompt(rendered)


def _bytes(side: TokenizerSettings, ids: Ids, kept: int) -> int:
    return int(side.tokenizer.byte_lengths(ids)[:kept].sum())


def _complete(side: TokenizerSettings, prompt: Ids, ids: Ids, chunk: Ids, first: int, rest: int) -> TokenizedSample:
    """A complete response: EOS up to the next multiple of the block size, at least one, so that a block model can stop.

    The first EOS is of chunk ``first``, the others of chunk ``rest``.
    """
    content = len(prompt) + len(ids)
    eos = side.block - content % side.block
    ends = np.full(eos, rest, np.int32)
    ends[0] = first
    return TokenizedSample(
        ids=np.concatenate([prompt, ids, np.full(eos, side.tokenizer.eos_id, np.int32)]),
        chunk=np.concatenate([np.full(len(prompt), PROMPT, np.int32), chunk, ends]),
        prompt=len(prompt),
        content_end=content,
    )


def _cut(prompt: Ids, ids: Ids, chunk: Ids) -> TokenizedSample:
    """A response that exceeds the length: cut, without EOS."""
    return TokenizedSample(
        ids=np.concatenate([prompt, ids]),
        chunk=np.concatenate([np.full(len(prompt), PROMPT, np.int32), chunk]),
        prompt=len(prompt),
        content_end=len(prompt) + len(ids) - 1,
    )
