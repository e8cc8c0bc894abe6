"""Text -> batches.

``corpus`` makes conversations that every machine has, ``sources`` and ``chat`` read them (``sample`` takes a few for a
bridge), ``prepare`` turns them, once, into an aligned, checksummed folder; ``store``, ``order`` and ``batch`` read that
folder step by step. Only ``batch`` needs torch.
"""

from megatron_tide.data.order import GlobalOrder
from megatron_tide.data.shard import PROMPT, UNCOVERED, Sample, Side
from megatron_tide.data.store import PreparedData, Stats

__all__ = ["PROMPT", "UNCOVERED", "GlobalOrder", "PreparedData", "Sample", "Side", "Stats"]
