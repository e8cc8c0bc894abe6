"""A bridge in a few lines, for people."""

from __future__ import annotations

from typing import Any

from megatron_tide.bridge.artefact import Bridge


def summary(bridge: Bridge) -> list[str]:
    """What a user wants to know of a bridge, a line each."""
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
    return lines


def _identity(side: dict[str, Any]) -> str:
    roles = ", ".join(f"{role} {side[f'{role}_id']}" for role in ("mask", "eos", "pad"))
    return f"{side['vocab_size']} ids, {roles}, {side['fingerprint'][:16]}"
