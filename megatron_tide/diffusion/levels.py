"""Noise levels: which tokens share a timestep, and which timesteps are drawn.

Shapes: B samples, S student positions, J blocks of the sample with most blocks, N noise levels, U units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_tide.diffusion.counter_rng import uniform_rows

_STREAM = b"timesteps"
Strata = tuple[NDArray[np.int64], int]
"""The stratum of each sample of a batch [B], and how many there are in the global batch."""


@dataclass(frozen=True, kw_only=True)
class NoiseSampling:
    """How the timesteps and masks of a batch are sampled. The defaults are the published setting.

    Every combination estimates the same denoising loss, sum over masked tokens of -log p / inverse_weight, without bias
    (a block's loss depends on only its own masks; see ``Levels`` for chunks that cross a block's end), with less
    variance for each that is on:

    per_block: each block of the student draws its own timestep. A sample's loss is a sum over blocks; with one timestep
    all of its terms are small or all are large (weight 1/t), with independent ones they average out.

    stratified: the timesteps cover (0, 1) evenly instead of at random. Sample i of the n of the global batch takes
    o_i = (perm(i) + u_i) / n, and block j of its b blocks (perm_i(j) + o_i) / b, with u_i uniform and permutations that
    are drawn by (seed, step) and by the sample: each number is uniform on (0, 1), so nothing is biased, and exactly one
    lies in each of n (samples) or b (blocks) strata of equal width. The variance of a mean of f(u) is then that of f
    WITHIN strata; the share between them, nearly all of it for a smooth f, is gone.

    exact: k of a level's n units are masked, k uniform on 1..n, weight n / k, instead of one coin flip per unit. For t
    uniform on (0, 1) and any function F of the drawn set (0 for the empty one), E_t[1/t E_Bernoulli(t)[F]] =
    E_k[n/k E_{k of n}[F]]: a given set of k has weight int t^(k-1) (1-t)^(n-k) dt = (k-1)! (n-k)! / n! in both. Weights
    end at n instead of 1/eps, and no level is empty. The law of the masks is the Bernoulli one given that something is
    masked, so means over chunks do not move either; lambda reads k / n.

    own_order: responses that say in which order the student wrote them have the masks of its decoder instead
    (``decoding_order``), with the share of masked tokens as rate and inverse weight. They are not denoised.
    """

    per_block: bool = False
    stratified: bool = False
    exact: bool = False
    own_order: bool = False

    def __post_init__(self) -> None:
        assert self.per_block or not self.own_order, "a state of the decoder is one of each block"


PUBLISHED = NoiseSampling()
PER_BLOCK_EXACT = NoiseSampling(per_block=True, exact=True)


@dataclass(frozen=True)
class Levels:
    """The noise levels of a batch: of each sample or block, where it has at least one token that can be masked.

    level_BS int64 [B, S]: of each token (without meaning where nothing can be masked). sample_N, block_N int64 [N]: the
    sample and the block of a level, counted from the first block of the response. blocks_B int64 [B]: number of blocks
    of each response. All tokens of a chunk have the level of its first one: a chunk that crosses the end of a block has
    one rate, and each of its tokens the weight of the rate it is really masked at. (The rest of the block it ends in
    has another one; so the mean weight of each token is unbiased there, too, but what it is predicted from is not
    distributed as with one timestep.)
    """

    level_BS: Tensor
    sample_N: Tensor
    block_N: Tensor
    blocks_B: Tensor

    @classmethod
    def of(cls, response_BS: Tensor, anchor_BS: Tensor, prompt_B: Tensor, length_B: Tensor, block: int) -> Levels:
        """``anchor_BS``: the position that a token takes its level from; ``block``: tokens of one block."""
        first_B, blocks_B = prompt_B // block, response_blocks(prompt_B, length_B, block)
        samples, longest = len(prompt_B), int(blocks_B.max())
        block_BS = (anchor_BS // block - first_B[:, None]).clamp(0, longest - 1)
        place_BS = torch.arange(samples)[:, None] * longest + block_BS
        exists = torch.zeros(samples * longest, dtype=torch.bool)
        exists[place_BS[response_BS]] = True
        place_N = exists.nonzero()[:, 0]
        level_BS = (exists.cumsum(0) - 1).clamp(min=0)[place_BS]
        return cls(level_BS, place_N // longest, place_N % longest, blocks_B)

    def uniforms(
        self, sampling: NoiseSampling, own_B: Tensor, strata: Strata | None, seed: int, epoch: int, keys_B: Tensor
    ) -> Tensor:
        """float64 [N]: the number in (0, 1] that each level's timestep is made from; ``own_B``: each sample's own."""
        if sampling.stratified and strata is not None:
            own_B = (torch.as_tensor(strata[0], dtype=torch.float64) + own_B) / strata[1]
        if not sampling.per_block:
            return own_B[self.sample_N]
        draws_BJ = uniform_rows(seed, epoch, keys_B, self.blocks_B, _STREAM)
        if sampling.stratified:  # the rank of a block's number among its sample's is a random permutation
            rank_BJ = draws_BJ.argsort(1).argsort(1)
            draws_BJ = (rank_BJ + own_B[:, None]) / self.blocks_B[:, None]
        return draws_BJ[self.sample_N, self.block_N]


def response_blocks(prompt_B: Tensor, length_B: Tensor, block: int) -> Tensor:
    """int64 [B]: in how many blocks each response lies, the first of them perhaps with the end of the prompt."""
    return ((length_B - 1) // block - prompt_B // block + 1).clamp(min=1)


def rank_within(group_U: Tensor, draw_U: Tensor) -> Tensor:
    """int64 [U]: how many of its own group have a smaller random number than each unit (equal ones: in order)."""
    order = torch.from_numpy(np.lexsort((draw_U.numpy(), group_U.numpy())))
    count = torch.bincount(group_U)
    start = count.cumsum(0) - count
    return torch.empty_like(group_U).scatter_(0, order, torch.arange(len(order)) - start[group_U[order]])
