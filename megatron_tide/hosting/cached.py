"""A teacher that ran before: its outputs from disk. No weights, no memory, no time.

Noise is a pure function of (seed, epoch, sample), so a run's teacher inputs are known before it. ``train.fill_cache``
runs any hosted teacher on all of them and writes its outputs; :class:`CachedTeacher` reads them, for any student,
objective at the same temperature, restart, and number of ranks.

    settings.json   everything that the outputs depend on; a run with other settings is refused by the name of the first
    SEED-N.arrow    the outputs of ``steps_per_shard`` steps, from step N * steps_per_shard: one row per sample
    manifest.json   written last: settings, the steps and shards of each seed, the mass covered

==========  =============  ===============================================================================
column      type           meaning
==========  =============  ===============================================================================
key         int64          hash of (seed, epoch, sample)
asked       int64          hash of all that the teacher saw of the sample, and of the tokens and pairs scored
logprobs    list<float>    of each scored token; empty if not needed
scores      list<float>    of each pair the D scores of ``DistributionTerm.target``; empty if not needed
top         list<int32>    of each pair the D - 1 categories that they are of; empty if they are of all
==========  =============  ===============================================================================

That a shard belongs to these settings is checked at the start, its digest when a run first needs it: it reads each
shard about once anyway.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_tide.bounds import short
from megatron_tide.config import DistillConfig, StrategyConfig
from megatron_tide.data.shard import MOST_TOKENS, Array, Shard, column, read_table, write_table
from megatron_tide.diffusion import DistillBatch
from megatron_tide.files import check_form, fingerprint, read_json
from megatron_tide.hosting.backend import Ranks, TeacherBackend
from megatron_tide.models.head import rows_per_slice
from megatron_tide.objectives import Strategy, TeacherOutputs

SETTINGS, MANIFEST = "settings.json", "manifest.json"
FORMAT = 1
AGAIN = "run the cache command again (finished shards are kept)"
_OPEN_SHARDS = 16
_LISTS = {"logprobs": np.float32, "scores": np.float32, "top": np.int32}
_SCHEMA = pa.schema(
    [pa.field(name, pa.int64()) for name in ("key", "asked")]
    + [pa.field(name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in _LISTS.items()]
)
# Flags of the strategy that the teacher's inputs depend on, but for those of CompDemo.
_INPUT_FLAGS = (
    "noise_schedule",
    "timesteps",
    "timestep_sampling",
    "mask_count",
    "masking",
    "teacher_context",
    "compdemo",
)

# What caches of earlier versions do not state, with the value that it had.
ADDED = {"own_masks": StrategyConfig().own_masks}


@dataclass(frozen=True)
class SampleInputs:
    """One sample of a micro-batch: ``key`` and ``asked`` as in the table above; its rows and pairs of the batch."""

    key: int
    asked: int
    rows: slice
    pairs: slice


@dataclass(frozen=True)
class SampleOutputs:
    """The teacher's outputs for one sample: the columns of the table above, lists as flat arrays."""

    key: int
    asked: int
    logprobs: NDArray[np.float32]
    scores: NDArray[np.float32]
    top: NDArray[np.int32]


def sample_inputs(batch: DistillBatch) -> list[SampleInputs]:
    """The teacher's inputs of a micro-batch, sample by sample (waits for the device).

    The hash covers what the model computes from: ids, positions and attention of the sample without its padding, in
    both CompDemo passes, the rows and their targets, and which of them are pairs.
    """
    given, samples = batch.teacher, len(batch.keys)
    assert given is not None
    sequences, length = given.input_ids.shape
    mask, valid_NL = given.attention, given.attention.valid.cpu().numpy()
    seen = [given.input_ids, given.position_ids, mask.block, mask.noised]
    seen_NL4 = torch.stack([part.cpu().long() for part in seen], -1).numpy()
    row_R, targets_R, pair_P = (x.cpu().numpy() for x in (given.rows, batch.teacher_targets, batch.pair_teacher_index))
    sequence_R, place_R = row_R // length, row_R % length
    sample_R = sequence_R % samples
    assert (np.diff(sample_R) >= 0).all(), "rows are ordered by sample"
    asked_R3 = np.stack([sequence_R // samples, place_R, targets_R], -1)
    row_ends, pair_ends = (np.searchsorted(x, np.arange(samples + 1)) for x in (sample_R, sample_R[pair_P]))
    found = []
    for n, key in enumerate(batch.keys.tolist()):
        rows, pairs = (slice(int(ends[n]), int(ends[n + 1])) for ends in (row_ends, pair_ends))
        digest = hashlib.blake2b(digest_size=8)
        for sequence in range(n, sequences, samples):
            digest.update(seen_NL4[sequence][valid_NL[sequence]].tobytes())
        digest.update(asked_R3[rows].tobytes())
        digest.update((pair_P[pairs] - rows.start).tobytes())
        seed, epoch = batch.draw
        own = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8)
        found.append(SampleInputs(_int64(own), _int64(digest), rows, pairs))
    return found


def _int64(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little", signed=True)


def sample_outputs(
    batch: DistillBatch, outputs: TeacherOutputs, strategy: Strategy, student_width: int
) -> list[SampleOutputs]:
    """A hosted teacher's outputs, sample by sample; ``student_width``: the number of the student's logits."""
    nothing = torch.empty(0)
    logprobs_R = nothing if outputs.target_logprobs is None else outputs.target_logprobs
    scores_PD, top_Pk = nothing, nothing.int()
    if strategy.rows is not None:
        assert outputs.hidden is not None
        assert outputs.head_weight is not None
        size = widths(strategy, student_width, len(outputs.head_weight))
        scores_PD = outputs.hidden.new_zeros(len(outputs.hidden), size["categories"], dtype=torch.float32)
        top_Pk = scores_PD.new_zeros(len(outputs.hidden), size["kept"], dtype=torch.int32)
        for term, index in strategy.terms(batch):
            # As many rows at once as the student's head takes in training.
            pieces = outputs.hidden[index].split(rows_per_slice(student_width))
            parts = [term.target((hidden_mH @ outputs.head_weight.T).float(), student_width) for hidden_mH in pieces]
            target_mD, *top_mk = (torch.cat(columns) for columns in zip(*parts))
            scores_PD[index, : target_mD.shape[-1]] = target_mD.float()
            if top_mk:
                top_Pk[index] = top_mk[0].int()
    logprobs, scores, top = (x.float().cpu().numpy() for x in (logprobs_R, scores_PD, top_Pk))
    return [
        SampleOutputs(q.key, q.asked, logprobs[q.rows], scores[q.pairs].ravel(), top[q.pairs].ravel().astype(np.int32))
        for q in sample_inputs(batch)
    ]


def write_outputs(path: Path, outputs: Sequence[SampleOutputs], record: dict[str, Any]) -> None:
    """One shard. ValueError where it would have more than 2^31 numbers."""
    columns = [column([getattr(sample, name) for sample in outputs], np.int64) for name in ("key", "asked")]
    for name, dtype in _LISTS.items():
        parts = [getattr(sample, name) for sample in outputs]
        ends = np.cumsum([0, *map(len, parts)])
        if ends[-1] > MOST_TOKENS:
            raise ValueError(f"{path}: too many numbers for one shard; use --teacher-top, or a smaller batch")
        columns.append(pa.ListArray.from_arrays(column(ends), column(np.concatenate([np.zeros(0), *parts]), dtype)))
    write_table(path, pa.record_batch(columns, schema=_SCHEMA), record)


def read_outputs(path: Path) -> Shard:
    """A shard of outputs; ValueError, one line, for a file that is corrupt."""
    shard = read_table(path, [_SCHEMA], AGAIN)
    for name in _LISTS:
        ends = shard.arrays[f"{name}_offsets"]
        if ends[0] != 0 or ends[-1] != len(shard.arrays[name]) or (np.diff(ends) < 0).any():
            raise ValueError(f"{path}: the offsets of {name} do not increase from 0 to their number; {AGAIN}")
    return shard


def shard_path(folder: Path, seed: int, number: int) -> Path:
    return folder / f"{seed}-{number:06d}.arrow"


def cache_settings(
    config: DistillConfig, strategy: Strategy, data: str, bridge: str | None, total_steps: int
) -> dict[str, Any]:
    """All that the outputs of a run depend on, but for the teacher's weights and the seed; by name, JSON.

    ``data``, ``bridge``: their fingerprints. Distributions depend on T and on how many categories are kept.
    """
    built, rows = strategy.describe(), strategy.rows
    found = {name: value for name, value in built.items() if name.startswith(_INPUT_FLAGS)}
    growth = config.strategy.block_growth if strategy.noise_sampling.per_block else ""
    found |= {"teacher_dtype": config.teacher.teacher_dtype, "data": data, "bridge": bridge}
    found |= {name: getattr(config.strategy, name) for name in ADDED}
    found |= {"global_batch_size": config.train.global_batch_size, "block_growth": growth}
    found |= {"steps": total_steps} if growth else {}
    if rows is not None:
        found |= {"temperature": rows.temperature, "teacher_top": rows.top}
        found |= {"distribution_rows": config.strategy.distribution_rows}
    return found | {"target_logprobs": strategy.needs_target_logprobs, "distributions": rows is not None}


def widths(strategy: Strategy, student_vocab: int, teacher_vocab: int) -> dict[str, int]:
    """Numbers per distribution: ``categories``, D of the table above, and ``kept``, D - 1, or 0 for all."""
    none = torch.zeros(0, teacher_vocab)
    terms = [term for term in (strategy.rows, strategy.first_rows) if term is not None]
    found = [[part.shape[-1] for part in term.target(none, student_vocab)] for term in terms]
    categories = max((sizes[0] for sizes in found), default=0)
    return {
        "categories": categories,
        "kept": max((sum(s[1:]) for s in found), default=0),
        "teacher_vocab": teacher_vocab,
    }


class OutputCache:
    """A finished folder of outputs: ``outputs(sample)`` of any of its seeds and steps."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.settings: dict[str, Any] = manifest["settings"]
        self._shard = functools.lru_cache(_OPEN_SHARDS)(self._checked)
        self._keys: NDArray[np.int64] = np.zeros(0, np.int64)
        self._places: NDArray[np.int32] = np.zeros((0, 2), np.int32)

    @classmethod
    def open(cls, folder: str | Path) -> OutputCache:
        """ValueError, one line, where the folder is no complete cache."""
        return cls(Path(folder), read_manifest(Path(folder)))

    @property
    def teacher(self) -> str:
        """The fingerprint of the teacher's weights."""
        return str(self.settings["teacher"])

    @property
    def covered(self) -> float | None:
        """The mean mass of the teacher in the categories that were kept; None without distributions."""
        covered: float | None = self.manifest["covered_mass"]
        return covered

    def refuse_other(self, wanted: dict[str, Any], seed: int, first: int, end: int) -> None:
        """ValueError with the first name by which the outputs are not those that a run needs.

        ``wanted``: ``cache_settings`` of the run; ``first``, ``end``: its steps with a teacher.
        """
        for part in ("target_logprobs", "distributions"):
            if wanted[part] and not self.settings[part]:
                raise ValueError(
                    f"{self.folder}: has no {part}, which this strategy needs; run the cache command with this strategy"
                )
        for name, value in wanted.items():
            found = self.settings.get(name, ADDED.get(name))
            if found != value and name not in ("target_logprobs", "distributions"):
                raise ValueError(
                    f"{self.folder}: the teacher was asked with {name} = {short(found)}, this run has "
                    f"{short(value)}; use that value, or run the cache command with another --out"
                )
        filled = self.manifest["seeds"].get(str(seed))
        if filled is None:
            seeds = ", ".join(sorted(self.manifest["seeds"], key=int))
            raise ValueError(f"{self.folder}: has seed {seeds}, not {seed}; run the cache command with --seeds {seed}")
        if filled["first"] > first or filled["end"] < end:
            raise ValueError(
                f"{self.folder}: has steps {filled['first']} to {filled['end']} of seed {seed}, this run needs {first} "
                f"to {end}; run the cache command with that number of steps"
            )

    def index(self) -> None:
        """Learn where the outputs of each sample are: 16 bytes of memory per sample.

        Raises:
            ValueError: a shard is missing, corrupt, or was made with other settings.
        """
        found, origin = [], fingerprint(self.settings)
        self._paths = [
            shard_path(self.folder, int(seed), int(number))
            for seed, filled in self.manifest["seeds"].items()
            for number in filled["shards"]
        ]
        for number, path in enumerate(self._paths):
            shard = read_outputs(path)
            if shard.record.get("settings") != origin:
                raise ValueError(f"{path}: made with other settings than {MANIFEST} says; {AGAIN}")
            keys = shard.arrays["key"].copy()  # a view would keep the file open, and there may be thousands
            found.append((keys, np.stack([np.full(len(keys), number), np.arange(len(keys))], -1).astype(np.int32)))
        keys, places = (np.concatenate(parts) for parts in zip(*found))
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], places[order]

    def outputs(self, sample: SampleInputs) -> dict[str, Array]:
        """The columns of one sample. ValueError where there are none, or of other inputs."""
        place = int(np.searchsorted(self._keys, sample.key))
        if place == len(self._keys) or self._keys[place] != sample.key:
            raise ValueError(f"{self.folder}: has no outputs for a sample of this run; {AGAIN}")
        number, row = self._places[place].tolist()
        arrays = self._shard(number).arrays
        if int(arrays["asked"][row]) != sample.asked:
            raise ValueError(
                f"{self._paths[number]}: row {row} is of other inputs than this run's (other text, masks or "
                "attention); run the cache command with another --out"
            )
        ends = {name: arrays[f"{name}_offsets"][row : row + 2].tolist() for name in _LISTS}
        return {name: arrays[name][start:end] for name, (start, end) in ends.items()}

    def _checked(self, number: int) -> Shard:
        shard = read_outputs(self._paths[number])
        if not shard.intact():
            raise ValueError(f"{self._paths[number]}: its bytes changed since it was written (sha256); {AGAIN}")
        return shard


_NUMBER = range(1 << 53)
_WHETHER = {"target_logprobs": bool, "distributions": bool}
_SETTINGS = {**dict.fromkeys(("categories", "kept", "teacher_vocab"), _NUMBER), **_WHETHER, "teacher": str}
SETTINGS_FORM = {**_SETTINGS, "steps_per_shard": range(1, 1 << 53)}
_FORM = {
    "settings": SETTINGS_FORM,
    "seeds": {str: {"first": _NUMBER, "end": _NUMBER, "seed": _NUMBER, "shards": [_NUMBER]}},
    "covered_mass": (None, float),
    "teacher_name": str,
    "format": range(FORMAT, FORMAT + 1),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder; ValueError, one line, where there is none."""
    path = folder / MANIFEST
    manifest = read_json(path, f"not a complete cache: {AGAIN}")
    stated = {name: value for name, value in manifest.items() if name != "fingerprint"}
    try:
        check_form(manifest, _FORM, "")
        whole = all(seed == str(filled["seed"]) and filled["shards"] for seed, filled in manifest["seeds"].items())
    except ValueError:
        whole = False
    if not (whole and manifest["seeds"] and fingerprint(stated) == manifest.get("fingerprint")):
        raise ValueError(f"{path}: edited, corrupt or of another version; {AGAIN}")
    return manifest


class CachedTeacher(TeacherBackend):
    """Outputs from a folder, read on the host."""

    def __init__(self, cache: OutputCache, strategy: Strategy) -> None:
        self.cache, self.strategy = cache, strategy
        cache.index()

    @classmethod
    def open(
        cls, folder: str, settings: dict[str, Any], dtype: torch.dtype, strategy: Strategy, ranks: Ranks
    ) -> CachedTeacher:
        cache = OutputCache.open(settings["cache"])
        mass = f", {cache.covered:.2%} of its mass in the categories compared singly" if cache.covered else ""
        ranks.print_rank0(f"teacher: outputs from {cache.folder}{mass}")
        return cls(cache, strategy)

    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        return [self._score(batch) for batch in microbatches]

    def _score(self, batch: DistillBatch) -> TeacherOutputs:
        found = [self.cache.outputs(sample) for sample in sample_inputs(batch)]
        rows, pairs, term = len(batch.teacher_targets), len(batch.pair_chunk), self.strategy.rows
        most = term.vocabulary.strings + term.vocabulary.bucket if term else 0

        def joined(name: str, width: int, count: int) -> Tensor:
            values = np.concatenate([sample[name] for sample in found])
            if len(values) != width * count:
                raise ValueError(f"{self.cache.folder}: {len(values)} {name}, not {width * count}; {AGAIN}")
            if name == "top" and len(values) and not 0 <= values.min() <= values.max() < most:
                raise ValueError(f"{self.cache.folder}: a category outside the {most} compared ones; {AGAIN}")
            return torch.from_numpy(values).to(batch.keys.device)

        logprobs = joined("logprobs", 1, rows) if self.strategy.needs_target_logprobs else None
        if not self.strategy.needs_hidden:
            return TeacherOutputs(target_logprobs=logprobs)
        width, kept = self.cache.settings["categories"], self.cache.settings["kept"]
        return TeacherOutputs(
            target_logprobs=logprobs,
            scores=joined("scores", width, pairs).reshape(pairs, width),
            top=joined("top", kept, pairs).reshape(pairs, kept).long() if kept else None,
            vocab_size=self.cache.settings["teacher_vocab"],
        )
