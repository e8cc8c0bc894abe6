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

from megatron_tide.diffusion import DistillBatch
from megatron_tide.hosting.flat_layers import FlatLayer
from megatron_tide.hosting.layerwise import LayerwiseForward, make_flat_layers
from megatron_tide.hosting.outputs import replicated_output, teacher_outputs
from megatron_tide.hosting.state import ForwardState, TeacherInputs
from megatron_tide.models.layer_specs import LayerSpecs
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy, TeacherOutputs

BUFFERS = 2  # units of a disk-hosted teacher in memory: the one at work and the next
Said = Callable[[str], None]


class Zero3Teacher:
    """A frozen teacher in a DeepSpeed engine of ZeRO stage 3, swept once per window."""

    def __init__(
        self,
        specs: LayerSpecs,
        source: ShardedFolder,
        dtype: torch.dtype,
        strategy: Strategy,
        settings: dict[str, Any],
        device: torch.device,
        print_rank0: Said = lambda line: None,
    ) -> None:
        self.strategy = strategy
        self.output = replicated_output(specs, source, dtype, device) if strategy.needs_hidden else None
        flat_layers = make_flat_layers(specs, dtype, output=self.output, gold=strategy.needs_target_logprobs)
        self.engine = _shard(
            flat_layers,
            source,
            engine_settings(settings, flat_layers, dtype, dist.get_world_size()),
            device,
            print_rank0,
        )

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        """One answer a micro-batch, after one sweep over the units; a collective of all ranks."""
        states = [ForwardState(TeacherInputs.of(batch)) for batch in microbatches]
        self.engine(states)
        return teacher_outputs(states, self.strategy, self.output)

    def metrics(self) -> dict[str, float]:
        return {}


def engine_settings(
    settings: dict[str, Any], flat_layers: Sequence[FlatLayer], dtype: torch.dtype, ranks: int
) -> dict[str, Any]:
    """The DeepSpeed configuration of a teacher: a ds_configs file plus what follows from its units and the world."""
    settings = copy.deepcopy(settings)
    settings |= {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    zero = settings["zero_optimization"]
    # Every unit is one tensor: none is small enough to keep, and one ahead is what a prefetch means.
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1, "stage3_max_reuse_distance": 0}
    zero["stage3_max_live_parameters"] = 4 * max(flat_layer.flat.numel() for flat_layer in flat_layers)
    offload = zero.get("offload_param")
    if offload and offload["device"] == "nvme":
        share = max(math.ceil(flat_layer.flat.numel() / ranks) for flat_layer in flat_layers)
        offload |= {"buffer_count": BUFFERS, "buffer_size": share, "max_in_cpu": 0}
    return settings


def _shard(
    flat_layers: Sequence[FlatLayer],
    source: ShardedFolder,
    settings: dict[str, Any],
    device: torch.device,
    print_rank0: Said,
) -> Any:
    """Load and partition one unit after another; no more than one is ever whole in memory."""
    import deepspeed

    swapper = None
    for number, flat_layer in enumerate(flat_layers, 1):
        print_rank0(
            f"teacher: sharding {flat_layer.title} ({number} of {len(flat_layers)}, "
            f"{flat_layer.flat_bytes / 1e9:.2f} GB)"
        )
        flat_layer.fill(source, device, read=dist.get_rank() == 0)
        context = deepspeed.zero.Init(
            module=flat_layer, config_dict_or_path=settings, mem_efficient_linear=False, param_swapper=swapper
        )
        swapper = context.param_swapper  # its buffers serve all units
    engine, *_ = deepspeed.initialize(model=LayerwiseForward(flat_layers).eval(), config=settings)
    return engine
