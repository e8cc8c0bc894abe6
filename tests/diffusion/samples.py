"""Small aligned samples as plain dicts, made by a generator or by hypothesis, and batches of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from megatron_tide.data.batch import Batch, Tokens

STUDENT_BLOCK, TEACHER_BLOCK = 4, 8
STUDENT_MASK, TEACHER_MASK = 900, 901
STUDENT_EOS, TEACHER_EOS = 800, 801


def make(
    key: int,
    prompts: tuple[int, int],
    spans: list[tuple[int, int]],
    *,
    ended: bool = True,
    student_only: bool = False,
) -> dict[str, Any]:
    """A sample of ``spans``: (student tokens, teacher tokens) of each run; a run of one side only is in no chunk.

    ``ended``: both sides are filled up with EOS, the first pair of which is the last chunk. Otherwise it was cut off.
    """
    student, teacher, chunks = [-1] * prompts[0], [-1] * prompts[1], 0
    for on_student, on_teacher in spans:
        covered = bool(on_student and on_teacher) and not student_only
        student += [chunks if covered else -2] * on_student
        teacher += [chunks if covered else -2] * on_teacher
        chunks += covered
    texts = len(student), len(teacher)
    if ended:
        student += [-2 if student_only else chunks] + [-2] * (-(len(student) + 1) % STUDENT_BLOCK)
        teacher += [chunks] * (1 + -(len(teacher) + 1) % TEACHER_BLOCK)
        chunks += not student_only
    sample = {"key": key, "chunks": chunks}
    sample |= _side("student", student, prompts[0], texts[0], STUDENT_EOS, key)
    return sample if student_only else sample | _side("teacher", teacher, prompts[1], texts[1], TEACHER_EOS, key)


def _side(name: str, chunk: list[int], prompt: int, text: int, eos: int, key: int) -> dict[str, Any]:
    ids = [1 + (7 * i + 13 * key) % 700 for i in range(text)] + [eos] * (len(chunk) - text)
    content_end = min(text, len(chunk) - 1)  # the first EOS, or a cut response's last token
    return {f"{name}_ids": ids, f"{name}_chunk": chunk, f"{name}_prompt": prompt, f"{name}_content_end": content_end}


@st.composite
def samples(draw: st.DrawFn, student_only: bool = False) -> dict[str, Any]:
    """Any sample: prompts from none to over a block, runs of up to 3 tokens a side or unaligned, ended or cut off."""
    prompts = draw(st.tuples(st.integers(0, 10), st.integers(0, 10)))
    runs = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)
    spans = [(1, 1), *draw(st.lists(runs, max_size=8))]
    key = draw(st.integers(-(2**63), 2**63 - 1))
    return make(key, prompts, spans, ended=draw(st.booleans()), student_only=student_only)


def collate(items: list[dict[str, Any]], padding: int = 0) -> Batch:
    """A batch, padded ``padding`` further than needed, with padding that would be noticed if anything read it."""
    student_only = "teacher_ids" not in items[0]
    return Batch(
        keys=torch.tensor([item["key"] for item in items]),
        student=_tokens(items, "student", padding),
        teacher=None if student_only else _tokens(items, "teacher", padding),
        chunks=torch.tensor([item["chunks"] for item in items]),
    )


def _tokens(items: list[dict[str, Any]], name: str, padding: int) -> Tokens:
    longest = max(len(item[f"{name}_ids"]) for item in items) + padding

    def padded(values: list[int]) -> list[int]:
        return values + [0] * (longest - len(values))

    return Tokens(
        ids=torch.tensor([padded(item[f"{name}_ids"]) for item in items]),
        chunk=torch.tensor([padded(item[f"{name}_chunk"]) for item in items], dtype=torch.int32),
        length=torch.tensor([len(item[f"{name}_ids"]) for item in items]),
        prompt=torch.tensor([item[f"{name}_prompt"] for item in items]),
        content_end=torch.tensor([item[f"{name}_content_end"] for item in items]),
    )
