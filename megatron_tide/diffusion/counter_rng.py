"""Counter-based random numbers that belong to a sample, not to a run.

Every random number is a pure function of (seed, epoch, sample key, stream): world size, micro-batch, order, padding and
resuming cannot change it. The key of the counter-based Philox generator is a hash of those four, and its raw output is
converted into uniforms here, so the numbers do not move with numpy's version or the platform.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_BITS = 52  # half a step more still fits the 53 bits of a float64: the ends 0 and 1 are never drawn


def uniforms(seed: int, epoch: int, key: int, stream: bytes, count: int) -> np.ndarray:
    """``count`` float64 in the open interval (0, 1); more of them never changes the first ones.

    ``stream`` (at most 16 bytes) separates the random numbers of different purposes.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16, person=stream).digest()
    philox = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    raw = philox.random_raw(count)
    return ((raw >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS


def uniform_rows(seed: int, epoch: int, keys_B: torch.Tensor, counts_B: torch.Tensor, stream: bytes) -> torch.Tensor:
    """One row of random numbers per sample: float64 [B, max(counts)]; +inf, above every rate, after a sample's own
    count.
    """
    counts = counts_B.tolist()
    rows = np.full((len(counts), max(counts, default=0)), np.inf)
    for row, key, count in zip(rows, keys_B.tolist(), counts, strict=True):
        row[:count] = uniforms(seed, epoch, key, stream, count)
    return torch.from_numpy(rows)
