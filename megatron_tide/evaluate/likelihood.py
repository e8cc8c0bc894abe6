"""Held-out likelihood: the diffusion bound in bits per byte, comparable across tokenizers and between both models.

For timesteps t the masked diffusion bound on a response's -log p is E_t[w(t) * sum over masked tokens of -log p(token)]
(w = 1/t: linear schedule, and the same value for any other; TIDE section 3, MDLM eq. 10). It is estimated on a grid of
K timesteps (``mc_samples``) per sample, or per block (``likelihood_noise``), and divided by the response's bytes. Whole
chunks are masked: every model on the same prepared data, student or teacher, predicts the same bytes, and with one
timestep per sample from the same bytes.

Scored are the tokens of content chunks and the end chunk (the first end of text). The padding after it is masked as in
training and never scored, nor are tokens outside all chunks. Bytes outside all chunks still count as bytes, for both
models: the bound stays comparable, and is that much too low in absolute terms (a prepared folder's manifest says how
many there are: usually none). Data without a teacher has no chunks: every response token up to the first end of text
is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import Batch, Tokens, read_batch
from megatron_tide.diffusion import ATTENTION_LAYOUTS, AttentionLayout, ModelInput, Noise, mask_of
from megatron_tide.evaluate.block_layout import lead_of, moved, without_lead
from megatron_tide.evaluate.bootstrap import Estimate, Floats, ratio
from megatron_tide.evaluate.likelihood_noise import PER_SAMPLE, LikelihoodNoise
from megatron_tide.generate.copies import shared
from megatron_tide.models import masked_hidden_states, score_rows
from megatron_tide.objectives.common import BINS, sums_at
from megatron_tide.screen import printable

VALIDATION_MC_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """Which model's tokens of prepared data are scored, and how the model sees them. Made by ``scoring_inputs``."""

    name: str
    """student or teacher"""
    layout: AttentionLayout
    block: int
    mask_id: int
    eos_id: int
    lengths: NDArray[np.int32]
    needs_chunks: bool
    at_answer: bool
    """Whether blocks begin at the response, in place of the start of the text."""

    def tokens(self, batch: Batch) -> Tokens:
        return getattr(batch, self.name)

    def placed(self, batch: Batch) -> tuple[Batch, torch.Tensor | None]:
        """``batch`` in this block layout, and the slots in front of each sample, int64 [B] (None: none)."""
        if not self.at_answer:
            return batch, None
        tokens = self.tokens(batch)
        sides: dict[str, Any] = {self.name: moved(tokens, self.block, self.eos_id)}
        return replace(batch, **sides), lead_of(tokens, self.block)

    def masked(self, drawn: Noise) -> torch.Tensor:
        """Bool [B, S]."""
        return getattr(drawn, f"{self.name}_masked")


def scoring_inputs(
    data: PreparedData, name: str, layout: str = "staircase", *, at_answer: bool = False
) -> ScoringInputs:
    """The ``name`` (student or teacher) half of ``data``; the staircase shows a teacher what the student sees.

    ``at_answer``: blocks begin at the response, as the published sampler decodes; else at the start, as in training.

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
        mask_id=mask_of(data, name, ATTENTION_LAYOUTS[layout]),
        eos_id=data.manifest[name]["eos_id"],
        lengths=getattr(data.stats, f"{name}_length"),
        needs_chunks=not data.student_only,
        at_answer=at_answer,
    )


@dataclass(frozen=True)
class MaskedTokens:
    """One forward pass: the input, and for each of its M rows the target token and the noise level it belongs to."""

    inputs: ModelInput
    targets_M: torch.Tensor
    level_M: torch.Tensor


def masked_tokens(scoring: ScoringInputs, batch: Batch, drawn: Noise) -> MaskedTokens:
    """The masked tokens of ``batch`` that count for the bound."""
    tokens, masked_BS = scoring.tokens(batch), scoring.masked(drawn)
    position_S = torch.arange(tokens.ids.shape[1])
    scored_BS = (position_S >= tokens.prompt.unsqueeze(1)) & (position_S <= tokens.content_end.unsqueeze(1))
    if scoring.needs_chunks:
        scored_BS = scored_BS & (tokens.chunk >= 0)
    sample_M, position_M = (masked_BS & scored_BS).nonzero(as_tuple=True)
    inputs = scoring.layout(tokens, masked_BS, sample_M, position_M, block=scoring.block, mask_id=scoring.mask_id)
    if scoring.needs_chunks:
        level_M = drawn.chunk_level[sample_M, tokens.chunk[sample_M, position_M].long()]
    else:
        level_M = drawn.student_level[sample_M, position_M]
    return MaskedTokens(inputs, tokens.ids[sample_M, position_M], level_M)


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """One model's result: totals with intervals, and per-sample sums for paired comparisons."""

    side: str
    samples: int
    mc_samples: int
    noise: str
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
            "noise": self.noise,
            "seed": self.seed,
            "response_bytes": int(self.bytes.sum()),
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "masked_token_accuracy": self.accuracy.to_dict(),
            "by_timestep": self.by_timestep,
        }

    def per_sample(self) -> dict[str, list[float]]:
        """JSON of the per-sample arrays, in the order of the samples; nats to 4 decimals."""
        return {"nats": self.nats.round(4).tolist(), "bytes": self.bytes.tolist()}

    def minus(self, other: LikelihoodReport) -> Estimate:
        """Bits per byte of this model minus the other's, paired sample by sample (masks: see ``likelihood_noise``).

        Raises:
            ValueError: the two were not measured on the same samples with the same timesteps.
        """
        mine, theirs = (
            (self.seed, self.mc_samples, self.noise, self.keys.tolist()),
            (other.seed, other.mc_samples, other.noise, other.keys.tolist()),
        )
        if mine != theirs:
            raise ValueError(
                "the two reports differ in samples, mc_samples, noise or seed; measure both with the same settings"
            )
        return ratio((self.nats - other.nats) / math.log(2.0), self.bytes, self.seed)


@dataclass(frozen=True, kw_only=True)
class LikelihoodSums:
    """Of the L noise levels, [L]: sample (of n) and pass (of K) as ``place`` int64 [2, L], rate, 1 / weight, summed
    -log p, correct predictions, scored masked tokens; ``bytes`` [n].
    """

    place: NDArray[np.int64]
    rate: Floats
    inverse_weight: Floats
    nats: Floats
    right: Floats
    masked: Floats
    bytes: Floats
    mc_samples: int

    def of_samples(self, values_L: Floats) -> Floats:
        """[n]: the sum over the levels of each sample, pass by pass."""
        sum_nK = np.zeros((len(self.bytes), self.mc_samples))
        np.add.at(sum_nK, tuple(self.place), values_L)
        return sum_nK.sum(1)

    def bound(self) -> Floats:
        """Nats per sample, [n]: the mean over its passes of the weighted -log p of its levels."""
        return self.of_samples(self.nats / self.inverse_weight) / self.mc_samples


def _logp_and_correct(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    target_logit_M = logits_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)
    return target_logit_M - logits_MV.logsumexp(-1), (logits_MV.argmax(-1) == targets_M).to(logits_MV.dtype)


@torch.no_grad()
def _score(model: Any, masked: MaskedTokens, levels: int, slice_rows: int | None) -> torch.Tensor:
    """float64 [3, N] on the host: -log p summed, correct predictions, masked tokens of each noise level."""
    if not len(masked.targets_M):
        return torch.zeros(3, levels, dtype=torch.float64)
    device = model.head_weight.device
    inputs, targets_M, level_M = masked.inputs.to(device), masked.targets_M.to(device), masked.level_M.to(device)
    hidden_MH = masked_hidden_states(model, inputs)
    logp_M, correct_M = score_rows(_logp_and_correct, hidden_MH, model.head_weight, (targets_M,), slice_rows)
    columns_3M = (-logp_M.double(), correct_M.double(), torch.ones_like(logp_M, dtype=torch.float64))
    return torch.stack([sums_at(level_M, column_M, levels) for column_M in columns_3M]).cpu()


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
    noise: LikelihoodNoise,
    seed: int,
    batch_size: int,
    slice_rows: int | None,
    label: str,
    copies: Sequence[Any] = (),
) -> LikelihoodSums:
    """The sums of the samples ``indices``, in their order; the model is put in eval mode meanwhile.

    ``copies`` of it, on other GPUs, take a share of the batches; the numbers are the same.
    """
    places_L, numbers_L = [np.zeros((2, 0), np.int64)], [np.zeros((5, 0))]
    was_training = model.training
    model.eval()

    def work(model: Any, places: np.ndarray) -> list[tuple[NDArray[np.int64], Floats]]:
        found_K = []
        batch, lead_B = scoring.placed(read_batch(data, indices[places]))
        for k, drawn in enumerate(noise.draws(batch, scoring.tokens(batch), scoring.block, mc_samples, seed)):
            found = masked_tokens(scoring, batch, drawn)
            if lead_B is not None:
                found = replace(found, inputs=without_lead(found.inputs, lead_B))
            scores_3N = _score(model, found, len(drawn.rate), slice_rows)
            place_L = np.stack((places[drawn.level_sample.numpy()], np.full(len(drawn.rate), k)))
            found_K.append((place_L, torch.stack((drawn.rate, drawn.inverse_weight, *scores_3N)).numpy()))
        return found_K

    batches = list(_batches(scoring, indices, batch_size))
    with tqdm(total=len(indices), desc=printable(label, keep=""), disable=not label, leave=False) as bar:
        for places, found_K in zip(batches, shared([model, *copies], work, batches)):
            for place_L, number_L in found_K:
                places_L.append(place_L)
                numbers_L.append(number_L)
            bar.update(len(places))
    model.train(was_training)
    size = np.array([data.sample(int(index)).response_bytes for index in indices], dtype=np.float64)
    rate, inverse_weight, nats, right, masked = np.concatenate(numbers_L, 1)
    return LikelihoodSums(
        place=np.concatenate(places_L, 1),
        rate=rate,
        inverse_weight=inverse_weight,
        nats=nats,
        right=right,
        masked=masked,
        bytes=size,
        mc_samples=mc_samples,
    )


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
    noise: LikelihoodNoise = PER_SAMPLE,
    seed: int = 0,
    batch_size: int = 8,
    slice_rows: int | None = None,
    label: str = "",
    copies: Sequence[Any] = (),
) -> LikelihoodReport:
    """Measure ``model`` on ``samples`` (0 = all) of ``data``, with ``mc_samples`` timesteps per sample or block.

    The result depends on (data, samples, mc_samples, noise, seed) and the weights; ``batch_size`` and ``slice_rows``
    change memory and speed only, and so do ``copies`` of the model on other GPUs, which share the batches. ``label``
    names a progress bar; without one there is none.
    """
    if mc_samples < 1 or batch_size < 1:
        raise ValueError(f"likelihood: mc_samples {mc_samples} and batch size {batch_size} must both be 1 or more")
    noise.check(scoring.layout)
    indices = spread(len(data), samples)
    sums = measure(
        model,
        data,
        scoring,
        indices,
        mc_samples=mc_samples,
        noise=noise,
        seed=seed,
        batch_size=batch_size,
        slice_rows=slice_rows,
        label=label,
        copies=copies,
    )
    nats_n = sums.bound()
    if not np.isfinite(nats_n).all():
        who = label or f"the {scoring.name}"
        raise ValueError(f"{who}: log-probabilities are no numbers; its weights are damaged, or too large for --dtype")
    return LikelihoodReport(
        side=scoring.name,
        samples=len(indices),
        mc_samples=mc_samples,
        noise=noise.name,
        seed=seed,
        bits_per_byte=ratio(nats_n / math.log(2.0), sums.bytes, seed),
        accuracy=ratio(sums.of_samples(sums.right), sums.of_samples(sums.masked), seed),
        by_timestep=_by_timestep(sums, seed),
        nats=nats_n,
        bytes=sums.bytes,
        keys=data.stats.keys[indices],
    )


def _by_timestep(sums: LikelihoodSums, seed: int) -> list[dict[str, float]]:
    """Bits per masked token and accuracy, with intervals, in ``BINS`` equal bins of the masking rate; empty bins are
    omitted."""
    bin_L = np.clip((sums.rate * BINS).astype(int), 0, BINS - 1)
    rows = []
    for number in range(BINS):
        here_L = bin_L == number
        nats_n, right_n, masked_n = (sums.of_samples(part * here_L) for part in (sums.nats, sums.right, sums.masked))
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
        noise=PER_SAMPLE,
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
