"""The teacher sharded by DeepSpeed's ZeRO-3: a share of every unit on each rank's GPU, in its host memory, or on disk.

    checkpoint -> rank 0 reads a unit -> broadcast -> every rank keeps its share          (loading, a unit at a time)
    gather unit k+1 | run unit k over the whole window -> release                         (a sweep, once a step)

Where the shares lie is the ds_configs file's business (``offload_param``); sizes that follow from the teacher are
filled in here. All ranks take the same number of sweeps, each of the same gathers: nothing depends on data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_tide.diffusion import Noised
from megatron_tide.hosting.answers import answers_of, resident_output
from megatron_tide.hosting.passage import Passage, Question
from megatron_tide.hosting.sweep import Sweep, make_units
from megatron_tide.hosting.units import Unit
from megatron_tide.models.sections import Sections
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy, TeacherAnswer

BUFFERS = 2  # units of a disk-hosted teacher in memory: the one at work and the next
Said = Callable[[str], None]


class Zero3Teacher:
    """A frozen teacher in a DeepSpeed engine of ZeRO stage 3, swept once per window."""

    def __init__(
        self,
        sections: Sections,
        source: ShardedFolder,
        dtype: torch.dtype,
        strategy: Strategy,
        settings: dict[str, Any],
        device: torch.device,
        say: Said = lambda line: None,
    ) -> None:
        self.strategy = strategy
        self.output = resident_output(sections, source, dtype, device) if strategy.needs_hidden else None
        units = make_units(sections, dtype, output=self.output, gold=strategy.needs_gold)
        self.engine = _shard(units, source, engine_settings(settings, units, dtype, dist.get_world_size()), device, say)

    @torch.no_grad()
    def score(self, window: Sequence[Noised]) -> list[TeacherAnswer]:
        """One answer a micro-batch, after one sweep over the units; a collective of all ranks."""
        passages = [Passage(Question.of(noised)) for noised in window]
        self.engine(passages)
        return answers_of(passages, self.strategy, self.output)

    def read(self) -> dict[str, float]:
        return {}


def engine_settings(settings: dict[str, Any], units: Sequence[Unit], dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a teacher: a ds_configs file plus what follows from its units and the world."""
    settings = copy.deepcopy(settings)
    settings |= {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    zero = settings["zero_optimization"]
    # Every unit is one tensor: none is small enough to keep, and one ahead is what a prefetch means.
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1, "stage3_max_reuse_distance": 0}
    zero["stage3_max_live_parameters"] = 4 * max(unit.flat.numel() for unit in units)
    offload = zero.get("offload_param")
    if offload and offload["device"] == "nvme":
        share = max(math.ceil(unit.flat.numel() / ranks) for unit in units)
        offload |= {"buffer_count": BUFFERS, "buffer_size": share, "max_in_cpu": 0}
    return settings


def _shard(
    units: Sequence[Unit], source: ShardedFolder, settings: dict[str, Any], device: torch.device, say: Said
) -> Any:
    """Load and partition one unit after another; no more than one is ever whole in memory."""
    import deepspeed

    swapper = None
    for number, unit in enumerate(units, 1):
        say(f"teacher: sharding {unit.title} ({number} of {len(units)}, {unit.flat_bytes / 1e9:.2f} GB)")
        unit.fill(source, device, read=dist.get_rank() == 0)
        context = deepspeed.zero.Init(
            module=unit, config_dict_or_path=settings, mem_efficient_linear=False, param_swapper=swapper
        )
        swapper = context.param_swapper  # its buffers serve all units
    engine, *_ = deepspeed.initialize(model=Sweep(units).eval(), config=settings)
    return engine
