"""Build a bridge on disk, or reuse a finished one; and summarise it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tide.bridge.artifact import MANIFEST, Bridge
from megatron_tide.bridge.tokenizer import TextTokenizer
from megatron_tide.files import refuse_other


def build_bridge(
    student: TextTokenizer,
    teacher: TextTokenizer,
    texts: Sequence[str],
    out: Path,
    *,
    sample_limit: int,
    coverage_floor: float,
    fresh: bool = False,
) -> tuple[Bridge, bool]:
    """The bridge in ``out``, measured on ``texts``; and whether it was built now.

    Raises:
        ValueError: ``out`` holds another bridge (unless ``fresh``), or chunks cover less than ``coverage_floor``.
    """
    refuse_other(out / MANIFEST, "sha256", "a bridge")
    request = {"sample_sha256": _digest(texts), "sample_limit": sample_limit}
    found = not fresh and (out / MANIFEST).exists()
    bridge = (
        _finished(out, student, teacher, request) if found else Bridge.build(student, teacher, texts, request=request)
    )
    bridge.require_coverage(coverage_floor)
    if not found:
        bridge.save(out)
    return bridge, not found


def _finished(out: Path, student: TextTokenizer, teacher: TextTokenizer, request: dict[str, Any]) -> Bridge:
    bridge = Bridge.load(out)
    try:
        bridge.check(student, teacher)
    except ValueError as error:
        raise ValueError(
            f"{out}: contains a bridge of other tokenizers; pass --fresh to replace it ({error})"
        ) from error
    if bridge.manifest["request"] != request:
        raise ValueError(f"{out}: contains a bridge measured on another sample; pass --fresh to replace it")
    return bridge


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def summary(bridge: Bridge) -> str:
    """The tokenizers, the sample and the coverage, one line each."""
    sample, sides = bridge.manifest["sample"], [(side, bridge.manifest[side]) for side in ("student", "teacher")]
    lines = [f"{side}: {about['name']} ({_identity(about)})" for side, about in sides]
    lines.append(f"bridge: {bridge.fingerprint[:16]}")
    lines.append(
        f"vocabulary: {bridge.manifest['mapped']} strings mapped, first {bridge.shared_prefix} ids equal"
        + (", one shared tokenizer" if bridge.shared else "")
    )
    lines.append(
        f"sample: {sample['texts']} texts, {sample['bytes']} bytes; {sample['student_tokens']} student and "
        f"{sample['teacher_tokens']} teacher tokens in {sample['chunks']} chunks"
    )
    share = sample["one_to_one"] / max(sample["chunks"], 1)
    lines.append(f"coverage: {bridge.coverage:.4f} of bytes in chunks; one-to-one: {share:.4f} of chunks")
    if shares := sample.get("spelling"):
        where = {"in the sample": shares["sample"], "in the vocabulary": shares["vocabulary"]}
        texts = [f"{of['one_token']:.4f} / {of['several_tokens']:.4f} {name}" for name, of in where.items()]
        lines.append(f"teacher's tokens that are one / several student tokens: {', '.join(texts)}")
    return "\n".join(lines)


def _identity(side: dict[str, Any]) -> str:
    roles = ", ".join(f"{role} {side[f'{role}_id']}" for role in ("mask", "eos", "pad"))
    return f"{side['vocab_size']} ids, {roles}, {side['fingerprint'][:16]}"
