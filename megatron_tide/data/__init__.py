"""Text -> batches.

``corpus`` makes conversations that every machine has, ``sources`` reads them (``sample`` takes a few for a bridge),
``prepare`` turns them, once, into an aligned, checksummed folder that ``datasets`` reads too; ``prepared``, ``sampler``
and ``batch`` read that folder step by step. Only ``batch`` needs torch.
"""

from megatron_tide.data.prepared import PreparedData, Stats
from megatron_tide.data.sampler import DistributedBatchSampler
from megatron_tide.data.shard import PROMPT, UNALIGNED, Sample, TokenizedSample

__all__ = ["PROMPT", "UNALIGNED", "DistributedBatchSampler", "PreparedData", "Sample", "Stats", "TokenizedSample"]
