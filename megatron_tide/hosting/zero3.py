"""The teacher sharded by DeepSpeed's ZeRO-3: a share of every layer on each rank's GPU, in its host memory, or on disk.

    checkpoint -> rank 0 reads a layer -> broadcast -> every rank keeps its share          (loading, a layer at a time)
    gather layer k+1 | run layer k over all micro-batches -> release                       (a sweep, once per step)

The DeepSpeed JSON defines where the shares are (``offload_param``); sizes that follow from the teacher are filled in
here. All ranks make the same sweeps, each of the same gathers: nothing depends on data.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from megatron_tide.diffusion import DistillBatch
from megatron_tide.ds_config import offload_of
from megatron_tide.hosting.layerwise import (
    FlatLayer,
    ForwardState,
    LayerwiseForward,
    LayerwiseTeacher,
    TeacherInputs,
    outputs_of,
)
from megatron_tide.lock import NAME as LOCK
from megatron_tide.lock import RunLock, is_held
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import TeacherOutputs

_OWN, _YOUNG_SECONDS = "megatron_tide-", 60
BUFFERS = 2  # layers of a teacher on disk that are in memory: the one at work and the next


class Zero3Teacher(LayerwiseTeacher):
    """A frozen teacher in a DeepSpeed engine of ZeRO stage 3; one sweep per call."""

    def _load(self, source: ShardedFolder, settings: dict[str, Any]) -> None:
        """One layer after another is loaded and partitioned: at most one is complete in memory at any time."""
        import deepspeed

        settings = engine_settings(settings, self.flat_layers, self.dtype, self.ranks.size)
        offload, name = offload_of(settings), self.ranks.broadcast_object(uuid4().hex[:12])
        if offload.get("device") == "nvme":
            offload["nvme_path"] = str(own_folder(Path(offload["nvme_path"]), name))
        swapper = None
        for layer in self._announce(self.flat_layers):
            layer.fill(source, self.ranks.device, read=dist.get_rank() == 0)
            context = deepspeed.zero.Init(
                module=layer, config_dict_or_path=settings, mem_efficient_linear=False, param_swapper=swapper
            )
            swapper = context.param_swapper  # its buffers serve all layers
        self.engine, *_ = deepspeed.initialize(model=LayerwiseForward(self.flat_layers).eval(), config=settings)

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        states = [ForwardState(TeacherInputs.of(batch)) for batch in microbatches]
        self.engine(states)
        return outputs_of(states, self.strategy, self.head_weight)


def engine_settings(
    settings: dict[str, Any], flat_layers: Sequence[FlatLayer], dtype: torch.dtype, ranks: int
) -> dict[str, Any]:
    """The DeepSpeed configuration: a ds_configs file plus what follows from the teacher's layers and the ranks."""
    settings = copy.deepcopy(settings)
    settings |= {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    zero = settings["zero_optimization"]
    # Every layer is one tensor: none is small enough to keep, and a prefetch is one layer ahead.
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1, "stage3_max_reuse_distance": 0}
    largest = max(layer.flat.numel() for layer in flat_layers)
    zero["stage3_max_live_parameters"] = 4 * largest
    offload = zero.get("offload_param")
    if offload and offload["device"] == "nvme":
        offload |= {"buffer_count": BUFFERS, "buffer_size": math.ceil(largest / ranks), "max_in_cpu": 0}
    return settings


def own_folder(disk: Path, name: str) -> Path:
    """A private folder of this run on the teacher's disk, removed when the run ends.

    Each rank of the run holds a lock in it. Two runs on a node do not share one, and what a killed run has left (locks
    that nobody holds) is removed.
    """
    for old in disk.glob(f"{_OWN}*"):
        with contextlib.suppress(OSError, ValueError):  # gone meanwhile, or not one of ours
            is_young = time.time() - old.stat().st_mtime < _YOUNG_SECONDS  # about to take its lock
            locks = list(old.glob(f"{LOCK}-*"))  # without any it is no run's: a copy of this repository, for example
            if not is_young and locks and not any(map(is_held, locks)):
                shutil.rmtree(old)
    own = disk / f"{_OWN}{name}"
    held = RunLock(own, f"{LOCK}-{uuid4().hex[:12]}").__enter__()
    atexit.register(_leave, own, held)
    return own


def _leave(own: Path, held: RunLock) -> None:
    for path in [path for path in own.glob("*") if not path.name.startswith(LOCK)]:
        shutil.rmtree(path, ignore_errors=True)  # the other ranks of this run do it too
        with contextlib.suppress(OSError):
            path.unlink()  # a file
    held.__exit__()  # the last one: what is killed before is found by its lock
    with contextlib.suppress(OSError):
        own.rmdir()
