"""Timesteps and masks of the held-out bound: the grid of K passes, for whole samples or for each block.

Whole chunks are masked (``ChunkMasking``), drawn by (seed, k, sample).

``PER_SAMPLE``: one timestep per sample and pass, t_k = eps + (1 - eps)(k + u)/K with one u per sample. Every model on
the same prepared data, student or teacher, predicts the same bytes from the same bytes.

``PER_BLOCK`` has the same expectation and less variance: each block has its own timesteps, t_jk = ((k + j) mod K +
u_j)/K for block j, and k of its n chunks are masked, with weight n / k (``NoiseSampling``). It needs the staircase,
where a block's loss depends on only its own masks. Blocks are those of the model that is scored: under timesteps of the
student's blocks, one block of a teacher would be masked at several rates at once, and the sum would be no bound. So
student and teacher have different masks in this form, and two students the same ones. A chunk that crosses the end of a
block is masked with the block it begins in; tokens of the next one are then predicted from masks that are not quite
those of one timestep: the only difference in expectation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_tide.data.batch import Batch, Tokens
from megatron_tide.diffusion import ATTENTION_LAYOUTS, MASKINGS, AttentionLayout, Noise, NoiseSampling, noise
from megatron_tide.diffusion.counter_rng import uniform_rows, uniforms
from megatron_tide.diffusion.levels import PER_BLOCK_EXACT, PUBLISHED, response_blocks
from megatron_tide.diffusion.noise_schedule import LINEAR

SCHEDULE = LINEAR
GRID_STREAM = b"likelihood"


@dataclass(frozen=True)
class LikelihoodNoise:
    """One of ``LIKELIHOOD_NOISE``."""

    name: str
    sampling: NoiseSampling

    def check(self, layout: AttentionLayout) -> None:
        """Raises: ValueError for timesteps per block under attention in which blocks see each other's masks."""
        if self.sampling.per_block and layout is not ATTENTION_LAYOUTS["staircase"]:
            raise ValueError(
                f"likelihood noise {self.name!r} needs teacher context staircase: in the others a block's loss depends "
                "on the masks of other blocks; change one of the two"
            )

    def draws(self, batch: Batch, tokens: Tokens, block: int, mc_samples: int, seed: int) -> Iterator[Noise]:
        """The noise of each of K = ``mc_samples`` passes over a batch; ``tokens``, ``block``: of the scored side."""
        given: dict[str, Any] = {"seed": seed, "masking": MASKINGS["synchronous"], "schedule": SCHEDULE}
        if not self.sampling.per_block:
            grid_BK = timestep_grid(batch.keys, mc_samples, seed)
            yield from (noise(batch, epoch=k, t=grid_BK[:, k], **given) for k in range(mc_samples))
            return
        batch = replace(batch, student=tokens)  # noise levels are those of the student's side
        blocks_B = response_blocks(tokens.prompt, tokens.length, block)
        for k, t_BJ in enumerate(block_grid(batch.keys, int(blocks_B.max()), mc_samples, seed)):
            yield noise(batch, epoch=k, t=t_BJ, sampling=self.sampling, block=block, **given)


PER_SAMPLE = LikelihoodNoise("sample", PUBLISHED)
PER_BLOCK = LikelihoodNoise("block", PER_BLOCK_EXACT)


def timestep_grid(keys: torch.Tensor, mc_samples: int, seed: int) -> torch.Tensor:
    """float64 [B, K]: one timestep in each of K equal strata of (eps, 1), shifted by one u per sample."""
    shift_B = torch.tensor([uniforms(seed, 0, int(key), GRID_STREAM, 1)[0] for key in keys], dtype=torch.float64)
    return SCHEDULE.draw((torch.arange(mc_samples, dtype=torch.float64) + shift_B.unsqueeze(1)) / mc_samples)


def block_grid(keys: torch.Tensor, blocks: int, mc_samples: int, seed: int) -> torch.Tensor:
    """float64 [K, B, J] of J blocks: each has one timestep in each of K equal strata of (0, 1), shifted by one u per
    block, in a pass the next block one in the next stratum."""
    shift_BJ = uniform_rows(seed, 0, keys, torch.full_like(keys, blocks), GRID_STREAM)
    stratum_KJ = (torch.arange(mc_samples)[:, None] + torch.arange(blocks)) % mc_samples
    return (stratum_KJ[:, None] + shift_BJ) / mc_samples
