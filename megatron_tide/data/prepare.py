"""Text -> a prepared folder: conversations tokenised, aligned, cut and stored once, before any training.

    mixture of sources -> positions -> shards of ``--shard-rows`` positions, built in parallel -> manifest

``settings.json`` is written first and identifies the folder's content; each shard is written atomically and is a pure
function of the settings; ``manifest.json`` is written last. A killed run, started again, keeps all finished shards and
ends with the same bytes as an uninterrupted one. No process group, no accelerator.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from megatron_tide.bounds import short
from megatron_tide.data.build import UNREADABLE, PrepareJob, build_missing, finished
from megatron_tide.data.encode import ENCODING, NO_ASSISTANT, Encoder
from megatron_tide.data.prepared import FORMAT, MANIFEST
from megatron_tide.data.shard import SHARD_NAME, SIDES, read_shard
from megatron_tide.data.sources import Mixture, check_unreadable
from megatron_tide.files import (
    atomic_write,
    fingerprint,
    read_json,
    refuse_foreign,
    refuse_other,
    remove_drafts,
    sha256_file,
    write_json,
)
from megatron_tide.lock import RunLock

SETTINGS, CARD = "settings.json", "README.md"
_LOCK = ".prepare.lock"
_LISTED, _SHOWN = 100, 5  # unreadable rows in the manifest and on the terminal
_CARD = """---
configs:
- config_name: default
  data_files: shard-*.arrow
---
# Prepared data

Samples for block diffusion training with megatron_tide, made by `python -m megatron_tide prepare`: tokens of the
student and, in data for distillation, of the teacher, with the chunk that each token belongs to.
`datasets.load_dataset` reads this folder. `megatron_tide/data/shard.py` describes the columns; `manifest.json` contains
tokenizers, counts and hashes.
"""
_CALLED = re.compile(r"(student|teacher)\.name|sources\[\d+\]\.path")  # names and paths do not affect the content


def prepare(job: PrepareJob, *, workers: int = 1, coverage_floor: float = 0.0, fresh: bool = False) -> dict[str, Any]:
    """Build what is missing of a job's folder and return its manifest.

    ValueError when the folder was made with other settings, when no sample is left, or when less than
    ``coverage_floor`` of the response bytes are in chunks; OSError when the disk is full.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    with RunLock(job.out, _LOCK):
        job = replace(job, settings=_claim(job, fresh))
        remove_drafts(job.out)
        missing = [number for number in range(job.shards) if not finished(job, number)]
        if missing:
            build_missing(job, missing, min(workers, len(missing)))
        manifest = _manifest(job)
        _check_outcome(job, manifest, coverage_floor)
        path = job.out / MANIFEST
        if not (job.out / CARD).exists():  # it may have notes of the user
            atomic_write(job.out / CARD, _CARD.encode())
        if missing or not path.exists() or not _is_of(read_json(path), manifest):
            write_json(path, manifest)
    return manifest


def settings_of(mixture: Mixture, encoder: Encoder, shard_rows: int, limit: int | None) -> dict[str, Any]:
    """Everything that affects the bytes of a prepared folder, as JSON."""
    return {
        "format": FORMAT,
        "encoding": ENCODING,
        "student": encoder.student.describe(),
        "teacher": encoder.teacher.describe() if encoder.teacher else None,
        "bridge": encoder.bridge.fingerprint if encoder.bridge else None,
        "sources": [source.description for source in mixture.sources],
        "limit": limit,
        "shard_rows": shard_rows,
        **({"own": mixture.own} if mixture.own else {}),
        **({"ordered": True} if mixture.ordered else {}),
    }


def _claim(job: PrepareJob, fresh: bool) -> dict[str, Any]:
    """Check that the folder belongs to this job: empty, or begun with the same settings, or emptied (``fresh``).

    Returns the settings as recorded in the folder (file names in them may differ).
    """
    path = job.out / SETTINGS
    shards = [old.name for old in job.out.glob("shard-*") if SHARD_NAME.fullmatch(old.name)]
    refuse_foreign(job.out, [MANIFEST, CARD, *shards], SETTINGS, "prepared data")
    if not path.exists():
        write_json(path, job.settings)
        return job.settings
    if fresh:
        refuse_other(path, "shard_rows", "prepared data")
        for name in (MANIFEST, *shards):
            (job.out / name).unlink(missing_ok=True)
        write_json(path, job.settings)
        return job.settings
    old_settings = read_json(path, "pass --fresh to start over, or use another --out")
    difference = _difference(old_settings, job.settings, "")
    if difference:
        name, before, now = difference
        raise ValueError(
            f"{job.out}: was prepared with {name} = {_shown(before)}, now it is {_shown(now)}; "
            "pass --fresh to start over, or use another --out"
        )
    return old_settings


def _difference(before: Any, now: Any, name: str) -> tuple[str, Any, Any] | None:
    """The first setting that differs, by name: (name, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {key: f"{name}.{key}" if name else str(key) for key in sorted(before.keys() | now.keys())}
        found = [_difference(before.get(k), now.get(k), n) for k, n in keys.items() if not _CALLED.fullmatch(n)]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        found = [_difference(b, n, f"{name}[{number}]") for number, (b, n) in enumerate(zip(before, now))]
    else:
        return None if before == now else (name, before, now)
    return next((difference for difference in found if difference is not None), None)


def _shown(value: Any) -> str:
    return short(f"{len(value)} of them" if isinstance(value, list) else value)


def _manifest(job: PrepareJob) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    unreadable: list[int] = []
    digests: list[str] = []
    example = None
    for number in range(job.shards):
        shard = read_shard(job.path(number))
        counts.update(shard.record["totals"])
        dropped.update(shard.record["dropped"])
        tokens.update({side: len(shard.arrays[f"{side}_ids"]) for side in SIDES})
        example = example or shard.record["example"]
        unreadable += shard.record["unreadable"]
        digests.append(shard.digest)
        shards.append({"file": job.path(number).name, "rows": len(shard), "sha256": sha256_file(job.path(number))})
    kept = sum(entry["rows"] for entry in shards)
    coverage = counts["covered_bytes"] / counts["total_bytes"] if counts["total_bytes"] else 0.0
    changed = {side: counts[f"{side}_changed"] for side in SIDES if counts[f"{side}_changed"]}
    about = {"read": counts["read"], "kept": kept, "truncated": counts["truncated"], "dropped": dropped}
    manifest = job.settings | {
        "counts": about | ({"changed": changed} if changed else {}),
        "tokens": tokens,
        "coverage": coverage if job.encoder.bridge else None,
        "refused_example": example,
        "unreadable": unreadable[:_LISTED],  # positions of the mixture
        "shards": shards,
    }
    sides = {side: {k: v for k, v in (manifest[side] or {}).items() if k != "name"} for side in SIDES}
    read = {name: manifest.get(name) for name in ("format", "bridge", "own", "ordered")}
    manifest["content"] = fingerprint({**read, **sides, "shards": digests})
    return manifest | {"fingerprint": fingerprint(manifest)}


def _is_of(kept: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a finished folder has this manifest, which in earlier versions did not say its content."""
    before = {name: value for name, value in manifest.items() if name not in ("content", "fingerprint")}
    return kept.get("fingerprint") in (manifest["fingerprint"], fingerprint(before))


def _check_outcome(job: PrepareJob, manifest: dict[str, Any], coverage_floor: float) -> None:
    counts, where = manifest["counts"], ", ".join(source.spec.path for source in job.mixture.sources)
    check_unreadable(job.mixture, counts["dropped"].get(UNREADABLE, 0), manifest["unreadable"])
    if not counts["kept"]:
        if counts["dropped"] == {NO_ASSISTANT: counts["read"]}:
            raise ValueError(f'{where}: no row has an assistant turn; responses are messages of the role "assistant"')
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts["dropped"].items()))
        example = f" (the first: {manifest['refused_example']})" if manifest["refused_example"] else ""
        raise ValueError(f"{where}: all {counts['read']} rows were dropped: {reasons}{example}")
    coverage = manifest["coverage"]
    if coverage is not None and coverage < coverage_floor:
        raise ValueError(
            f"{job.out}: the bridge covers {coverage:.4f} of the response bytes, less than --coverage-floor "
            f"{coverage_floor}: the tokenizers produce different bytes; the inspect command shows where"
        )


def summary(job: PrepareJob, manifest: dict[str, Any]) -> str:
    """Counts of prepared and dropped rows, and one line for each of the first unreadable rows."""
    counts = manifest["counts"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts["dropped"].items())) or "none"
    coverage = "" if manifest["coverage"] is None else f", {manifest['coverage']:.4%} of the bytes in chunks"
    lines = [
        f"prepared {counts['kept']:,} of {counts['read']:,} rows in {job.out} ({counts['truncated']:,} cut{coverage}; "
        f"dropped: {dropped})"
    ]
    for side, count in counts.get("changed", {}).items():
        lines.append(
            f"note: the {side}'s tokenizer changes the text of {count:,} rows (the inspect command shows where)"
        )
    lines += [f"skipped: {job.mixture.error(position)}" for position in manifest["unreadable"][:_SHOWN]]
    return "\n".join(lines)
