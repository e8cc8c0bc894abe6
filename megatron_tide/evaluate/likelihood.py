"""Held-out likelihood: the diffusion bound in bits per byte, comparable across tokenizers and between both models.

For timesteps t the masked diffusion bound on a response's -log p is E_t[w(t) * sum over masked tokens of -log p(token)]
(w = 1/t: linear schedule, and the same value for any other; TIDE section 3, MDLM eq. 10). It is estimated on a grid of
K timesteps per sample (``mc_samples``), t_k = eps + (1 - eps)(k + u)/K with one u per sample, and divided by the
response's bytes. Whole chunks are masked (``ChunkMasking``), drawn by (seed, k, sample): every model on the same
prepared data, student or teacher, predicts the same bytes from the same bytes.

Scored are the tokens of content chunks and the end chunk (the first end of text). The padding after it is masked as in
training and never scored, nor are tokens outside all chunks. Bytes outside all chunks still count as bytes, for both
models: the bound stays comparable, and is that much too low in absolute terms (a prepared folder's manifest says how
many there are: usually none). Data without a teacher has no chunks: every response token up to the first end of text
is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import Batch, Tokens, read_batch
from megatron_tide.diffusion import ATTENTION_LAYOUTS, MASKINGS, AttentionLayout, ModelInput, Noise, noise
from megatron_tide.diffusion.counter_rng import uniforms
from megatron_tide.diffusion.noise_schedule import LINEAR
from megatron_tide.evaluate.bootstrap import Estimate, Floats, ratio
from megatron_tide.models import masked_hidden_states, score_rows

SCHEDULE = LINEAR
GRID_STREAM = b"likelihood"
BINS = 10
VALIDATION_MC_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """Which model's tokens of prepared data are scored, and how the model sees them. Made by ``scoring_inputs``."""

    name: str
    """student or teacher"""
    layout: AttentionLayout
    block: int
    mask_id: int
    lengths: NDArray[np.int32]
    needs_chunks: bool

    def tokens(self, batch: Batch) -> Tokens:
        return getattr(batch, self.name)

    def masked(self, drawn: Noise) -> torch.Tensor:
        """Bool [B, S]."""
        return getattr(drawn, f"{self.name}_masked")


def scoring_inputs(data: PreparedData, name: str, layout: str = "staircase") -> ScoringInputs:
    """The ``name`` (student or teacher) half of ``data``; the staircase shows a teacher what the student sees.

    Raises:
        ValueError: the data has no teacher's half, or the layout is unknown.
    """
    if name == "teacher" and data.student_only:
        raise ValueError(f"{data.folder}: prepared without a teacher, so it cannot score one; prepare it with --bridge")
    if layout not in ATTENTION_LAYOUTS:
        raise ValueError(f"context {layout!r}: choose one of {', '.join(sorted(ATTENTION_LAYOUTS))}")
    return ScoringInputs(
        name=name,
        layout=ATTENTION_LAYOUTS[layout],
        block=data.manifest[name]["block"],
        mask_id=data.manifest[name]["mask_id"],
        lengths=getattr(data.stats, f"{name}_length"),
        needs_chunks=not data.student_only,
    )


@dataclass(frozen=True)
class MaskedTokens:
    """One forward pass: the input, and for each of its M rows the target token and the sample it belongs to."""

    inputs: ModelInput
    targets_M: torch.Tensor
    sample_M: torch.Tensor


def masked_tokens(scoring: ScoringInputs, batch: Batch, drawn: Noise) -> MaskedTokens:
    """The masked tokens of ``batch`` that count for the bound."""
    tokens, masked_BS = scoring.tokens(batch), scoring.masked(drawn)
    position_S = torch.arange(tokens.ids.shape[1])
    scored_BS = (position_S >= tokens.prompt.unsqueeze(1)) & (position_S <= tokens.content_end.unsqueeze(1))
    if scoring.needs_chunks:
        scored_BS = scored_BS & (tokens.chunk >= 0)
    sample_M, position_M = (masked_BS & scored_BS).nonzero(as_tuple=True)
    inputs = scoring.layout(tokens, masked_BS, sample_M, position_M, block=scoring.block, mask_id=scoring.mask_id)
    return MaskedTokens(inputs, tokens.ids[sample_M, position_M], sample_M)


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """One model's result: totals with intervals, and per-sample sums for paired comparisons."""

    side: str
    samples: int
    mc_samples: int
    seed: int
    bits_per_byte: Estimate
    accuracy: Estimate
    by_timestep: list[dict[str, float]]
    nats: Floats = field(repr=False)
    bytes: Floats = field(repr=False)
    keys: np.ndarray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON without the per-sample arrays."""
        return {
            "side": self.side,
            "samples": self.samples,
            "mc_samples": self.mc_samples,
            "seed": self.seed,
            "response_bytes": int(self.bytes.sum()),
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "masked_token_accuracy": self.accuracy.to_dict(),
            "by_timestep": self.by_timestep,
        }

    def minus(self, other: LikelihoodReport) -> Estimate:
        """Bits per byte of this model minus the other's, paired sample by sample (both saw the same masks).

        Raises:
            ValueError: the two were not measured on the same samples with the same timesteps.
        """
        mine, theirs = (
            (self.seed, self.mc_samples, self.keys.tolist()),
            (other.seed, other.mc_samples, other.keys.tolist()),
        )
        if mine != theirs:
            raise ValueError(
                "the two reports differ in samples, mc_samples or seed; measure both with the same settings"
            )
        return ratio((self.nats - other.nats) / math.log(2.0), self.bytes, self.seed)


@dataclass(frozen=True)
class LikelihoodSums:
    """Per sample and timestep, [n, K]: t, summed -log p, correct predictions, scored masked tokens; ``bytes`` [n]."""

    t: Floats
    nats: Floats
    right: Floats
    masked: Floats
    bytes: Floats

    def bound(self) -> Floats:
        """Nats per sample, [n]: the mean over its timesteps of w(t) times the summed -log p."""
        return (self.nats / SCHEDULE.inverse_weight(torch.from_numpy(self.t)).numpy()).mean(1)


def timestep_grid(keys: torch.Tensor, mc_samples: int, seed: int) -> torch.Tensor:
    """float64 [B, K]: one timestep in each of K equal strata of (eps, 1), shifted by one u per sample."""
    shift_B = torch.tensor([uniforms(seed, 0, int(key), GRID_STREAM, 1)[0] for key in keys], dtype=torch.float64)
    return SCHEDULE.draw((torch.arange(mc_samples, dtype=torch.float64) + shift_B.unsqueeze(1)) / mc_samples)


def _logp_and_correct(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target_logit_M = logits_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)
    return target_logit_M - logits_MV.logsumexp(-1), (logits_MV.argmax(-1) == targets_M).to(logits_MV.dtype)


@torch.no_grad()
def _score(model: Any, masked: MaskedTokens, samples: int, slice_rows: int | None) -> torch.Tensor:
    """float64 [3, B] on the host: -log p summed, correct predictions, masked tokens of each sample."""
    device = model.head_weight.device
    inputs, targets_M, sample_M = masked.inputs.to(device), masked.targets_M.to(device), masked.sample_M.to(device)
    hidden_MH = masked_hidden_states(model, inputs)
    logp_M, correct_M = score_rows(_logp_and_correct, hidden_MH, model.head_weight, (targets_M,), slice_rows)
    columns_3M = torch.stack((-logp_M.double(), correct_M.double(), torch.ones_like(logp_M, dtype=torch.float64)))
    return columns_3M.new_zeros(3, samples).index_add(1, sample_M, columns_3M).cpu()


def _batches(scoring: ScoringInputs, indices: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Places into ``indices``, samples of similar length together (least padding)."""
    order = np.argsort(scoring.lengths[indices], kind="stable")
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def measure(
    model: Any,
    data: PreparedData,
    scoring: ScoringInputs,
    indices: np.ndarray,
    *,
    mc_samples: int,
    seed: int,
    batch_size: int,
    slice_rows: int | None,
    label: str,
) -> LikelihoodSums:
    """The sums of the samples ``indices``, in their order; the model is put in eval mode meanwhile."""
    shape = (len(indices), mc_samples)
    sums = LikelihoodSums(
        np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape), bytes=np.zeros(len(indices))
    )
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(indices), desc=label, disable=not label, leave=False)
    for places in _batches(scoring, indices, batch_size):
        batch = read_batch(data, indices[places])
        grid_BK = timestep_grid(batch.keys, mc_samples, seed)
        sums.t[places] = grid_BK.numpy()
        sums.bytes[places] = [data.sample(int(index)).response_bytes for index in indices[places]]
        for k in range(mc_samples):
            drawn = noise(
                batch, seed=seed, epoch=k, masking=MASKINGS["synchronous"], schedule=SCHEDULE, t=grid_BK[:, k]
            )
            found = masked_tokens(scoring, batch, drawn)
            if len(found.targets_M):
                nats, right, masked = _score(model, found, len(places), slice_rows).numpy()
                sums.nats[places, k], sums.right[places, k], sums.masked[places, k] = nats, right, masked
        bar.update(len(places))
    bar.close()
    model.train(was_training)
    return sums


def spread(total: int, wanted: int) -> np.ndarray:
    """``wanted`` sample indices spread evenly over ``total`` (all of them when 0 or more than there are)."""
    count = total if wanted <= 0 else min(wanted, total)
    return np.arange(count) * total // count


def evaluate_likelihood(
    model: Any,
    data: PreparedData,
    scoring: ScoringInputs,
    *,
    samples: int = 0,
    mc_samples: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    slice_rows: int | None = None,
    label: str = "",
) -> LikelihoodReport:
    """Measure ``model`` on ``samples`` (0 = all) of ``data``, with ``mc_samples`` timesteps per sample.

    The result depends on (data, samples, mc_samples, seed) and the weights; ``batch_size`` and ``slice_rows`` change
    memory and speed only. ``label`` names a progress bar; without one there is none.
    """
    if mc_samples < 1 or batch_size < 1:
        raise ValueError(f"likelihood: mc_samples {mc_samples} and batch size {batch_size} must both be 1 or more")
    indices = spread(len(data), samples)
    sums = measure(
        model,
        data,
        scoring,
        indices,
        mc_samples=mc_samples,
        seed=seed,
        batch_size=batch_size,
        slice_rows=slice_rows,
        label=label,
    )
    nats_n = sums.bound()
    return LikelihoodReport(
        side=scoring.name,
        samples=len(indices),
        mc_samples=mc_samples,
        seed=seed,
        bits_per_byte=ratio(nats_n / math.log(2.0), sums.bytes, seed),
        accuracy=ratio(sums.right.sum(1), sums.masked.sum(1), seed),
        by_timestep=_by_timestep(sums, seed),
        nats=nats_n,
        bytes=sums.bytes,
        keys=data.stats.keys[indices],
    )


def _by_timestep(sums: LikelihoodSums, seed: int) -> list[dict[str, float]]:
    """Bits per masked token and accuracy, with intervals, in ``BINS`` equal bins of t; empty bins are omitted."""
    bin_nK = np.clip((sums.t * BINS).astype(int), 0, BINS - 1)
    rows = []
    for number in range(BINS):
        here_nK = bin_nK == number
        nats_n, right_n, masked_n = ((part * here_nK).sum(1) for part in (sums.nats, sums.right, sums.masked))
        if not masked_n.any():
            continue
        row = {"low": number / BINS, "high": (number + 1) / BINS, "masked_tokens": float(masked_n.sum())}
        bits, accuracy = ratio(nats_n / math.log(2.0), masked_n, seed), ratio(right_n, masked_n, seed)
        for name, estimate in (("bits_per_masked_token", bits), ("masked_token_accuracy", accuracy)):
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        rows.append(row)
    return rows


def validate(
    model: Any,
    data: PreparedData,
    scoring: ScoringInputs,
    *,
    world: Any,
    samples: int,
    batch_size: int,
    seed: int = 0,
    slice_rows: int | None = None,
) -> dict[str, float]:
    """Held-out bits per byte and masked-token accuracy during training, the same on every rank; one collective.

    Each rank scores every ``world.size``-th of the ``samples`` (``world``: ``rank``, ``size``, ``sum_over_ranks``).
    The values equal those of ``evaluate_likelihood`` with ``mc_samples=VALIDATION_MC_SAMPLES`` on the same samples.
    """
    indices = spread(len(data), samples)[world.rank :: world.size]
    sums = measure(
        model,
        data,
        scoring,
        indices,
        mc_samples=VALIDATION_MC_SAMPLES,
        seed=seed,
        batch_size=batch_size,
        slice_rows=slice_rows,
        label="",
    )
    nats, size, right, masked = world.sum_over_ranks(
        [sums.bound().sum(), sums.bytes.sum(), sums.right.sum(), sums.masked.sum()]
    )
    return {
        "validation/bits_per_byte": nats / size / math.log(2.0),
        "validation/masked_token_accuracy": right / masked if masked else math.nan,
    }
