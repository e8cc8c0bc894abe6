"""Held-out likelihood: the diffusion bound in bits per byte, comparable across tokenizers and between both sides.

For timesteps t the masked diffusion bound on a response's -log p is E_t[w(t) * sum over masked tokens of -log p(token)]
(w = 1/t: linear schedule, and the same value for any other; TIDE section 3, MDLM eq. 10). It is estimated on a grid,
t_k = eps + (1 - eps)(k + u)/K with one u a sample, and divided by the response's bytes. Whole chunks are masked
(``ChunkMasking``), drawn by (seed, k, sample), so every model on the same prepared data, student or teacher, guesses
the same bytes from the same bytes.

Bytes that no chunk covers are scored on neither side, yet count as bytes on both: the bound stays comparable, and is
that much too low in absolute terms (a prepared folder's manifest says how many there are: usually none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.diffusion import MASKINGS, noise
from megatron_tide.diffusion.counter_rng import uniforms
from megatron_tide.diffusion.noise_schedule import LINEAR
from megatron_tide.evaluate.bootstrap import Estimate, Floats, ratio
from megatron_tide.evaluate.sides import Question, Side, ask
from megatron_tide.models import masked_hidden_states, score_rows

SCHEDULE = LINEAR
GRID_STREAM = b"likelihood"
BINS = 10


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """What one model scored on one side: totals with intervals, and the sums a sample that comparisons are made of."""

    side: str
    samples: int
    draws: int
    seed: int
    bits_per_byte: Estimate
    accuracy: Estimate
    by_timestep: list[dict[str, float]]
    nats: Floats = field(repr=False)
    bytes: Floats = field(repr=False)
    keys: np.ndarray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON without the arrays a sample."""
        return {
            "side": self.side,
            "samples": self.samples,
            "draws": self.draws,
            "seed": self.seed,
            "response_bytes": int(self.bytes.sum()),
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "masked_token_accuracy": self.accuracy.to_dict(),
            "by_timestep": self.by_timestep,
        }

    def minus(self, other: LikelihoodReport) -> Estimate:
        """Bits per byte of this model less the other's, paired sample by sample (both saw the same masks).

        Raises:
            ValueError: when the two were not measured on the same samples with the same draws.
        """
        mine, theirs = (self.seed, self.draws, self.keys.tolist()), (other.seed, other.draws, other.keys.tolist())
        if mine != theirs:
            raise ValueError("the two reports differ in samples, draws or seed; measure both with the same settings")
        return ratio((self.nats - other.nats) / math.log(2.0), self.bytes, self.seed)


@dataclass(frozen=True)
class Sums:
    """Per sample and draw, all [n, K]: timestep, summed -log p, right guesses, scored masked tokens; ``bytes`` [n]."""

    t: Floats
    nats: Floats
    right: Floats
    masked: Floats
    bytes: Floats

    def bound(self) -> Floats:
        """Nats a sample, [n]: the mean over its draws of w(t) times the summed -log p."""
        return (self.nats / SCHEDULE.inverse_weight(torch.from_numpy(self.t)).numpy()).mean(1)


def timestep_grid(keys: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """float64 [B, K]: one timestep in each of K equal strata of (eps, 1), shifted by one u a sample."""
    shift_B = torch.tensor([uniforms(seed, 0, int(key), GRID_STREAM, 1)[0] for key in keys], dtype=torch.float64)
    return SCHEDULE.draw((torch.arange(draws, dtype=torch.float64) + shift_B.unsqueeze(1)) / draws)


def _gold_and_hit(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gold_logit_M = logits_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)
    return gold_logit_M - logits_MV.logsumexp(-1), (logits_MV.argmax(-1) == targets_M).to(logits_MV.dtype)


@torch.no_grad()
def _score(model: Any, question: Question, samples: int, slice_rows: int | None) -> torch.Tensor:
    """float64 [3, B] on the host: -log p summed, right guesses, rows of each sample."""
    device = model.head_weight.device
    inputs, targets_M, sample_M = question.inputs.to(device), question.gold.to(device), question.sample.to(device)
    hidden_MH = masked_hidden_states(model, inputs)
    logp_M, hit_M = score_rows(_gold_and_hit, hidden_MH, model.head_weight, (targets_M,), slice_rows)
    columns_3M = torch.stack((-logp_M.double(), hit_M.double(), torch.ones_like(logp_M, dtype=torch.float64)))
    return columns_3M.new_zeros(3, samples).index_add(1, sample_M, columns_3M).cpu()


def _batches(side: Side, indices: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Places into ``indices``, samples of like length together (least padding)."""
    order = np.argsort(side.lengths[indices], kind="stable")
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def measure(
    model: Any,
    data: PreparedData,
    side: Side,
    indices: np.ndarray,
    *,
    draws: int,
    seed: int,
    batch_size: int,
    slice_rows: int | None,
    progress: Callable[[int, int], None] | None,
) -> Sums:
    """The sums of the samples ``indices``, in their order; the model is put in eval mode meanwhile."""
    shape = (len(indices), draws)
    sums = Sums(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape), bytes=np.zeros(len(indices)))
    done, was_training = 0, model.training
    model.eval()
    for places in _batches(side, indices, batch_size):
        batch = read_batch(data, indices[places])
        grid_BK = timestep_grid(batch.keys, draws, seed)
        sums.t[places] = grid_BK.numpy()
        sums.bytes[places] = [data.sample(int(index)).response_bytes for index in indices[places]]
        for k in range(draws):
            drawn = noise(
                batch, seed=seed, epoch=k, masking=MASKINGS["synchronous"], schedule=SCHEDULE, t=grid_BK[:, k]
            )
            question = ask(side, batch, drawn)
            if len(question.gold):
                nats, right, masked = _score(model, question, len(places), slice_rows).numpy()
                sums.nats[places, k], sums.right[places, k], sums.masked[places, k] = nats, right, masked
        done += len(places)
        if progress is not None:
            progress(done, len(indices))
    model.train(was_training)
    return sums


def spread(total: int, wanted: int) -> np.ndarray:
    """``wanted`` sample indices spread evenly over ``total`` (all of them when 0 or more than there are)."""
    count = total if wanted <= 0 else min(wanted, total)
    return np.arange(count) * total // count


def evaluate_likelihood(
    model: Any,
    data: PreparedData,
    side: Side,
    *,
    samples: int = 0,
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    slice_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodReport:
    """Measure ``model`` on ``samples`` (0 = all) of ``data``, with ``draws`` timesteps a sample.

    The result depends on (data, samples, draws, seed) and the weights; ``batch_size`` and ``slice_rows`` change memory
    and speed only. ``progress(done, total)`` is called after each batch.
    """
    if draws < 1 or batch_size < 1:
        raise ValueError(f"likelihood: draws {draws} and batch size {batch_size} must both be 1 or more")
    indices = spread(len(data), samples)
    sums = measure(
        model,
        data,
        side,
        indices,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        slice_rows=slice_rows,
        progress=progress,
    )
    nats_n = sums.bound()
    return LikelihoodReport(
        side=side.name,
        samples=len(indices),
        draws=draws,
        seed=seed,
        bits_per_byte=ratio(nats_n / math.log(2.0), sums.bytes, seed),
        accuracy=ratio(sums.right.sum(1), sums.masked.sum(1), seed),
        by_timestep=_by_timestep(sums, seed),
        nats=nats_n,
        bytes=sums.bytes,
        keys=data.stats.keys[indices],
    )


def _by_timestep(sums: Sums, seed: int) -> list[dict[str, float]]:
    """Bits a masked token and accuracy, with intervals, in ``BINS`` equal bins of t; an empty bin is left out."""
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
