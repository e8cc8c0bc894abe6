"""What ranks do in tests of hosting: load micro-batches as training does, build a teacher, measure memory."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tide.config import from_flat
from megatron_tide.hosting.build import build_teacher
from megatron_tide.objectives import Strategy
from megatron_tide.train.build import make_loader
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.microbatches import MicrobatchLoader
from tests.support.disk import HAS_DISK_IO
from tests.support.models import write_hub_folder

Flags = dict[str, Any]


def hostings(disk: Path) -> dict[str, Flags]:
    """The flags of each hosting that works here; ``disk``: the folder of the one that needs it."""
    one_stage = disk / "pipeline_1.json"
    one_stage.write_text('{"pipeline": {"stages": 1}}')
    names = ["zero3", "zero3_cpu", *(["zero3_nvme"] if HAS_DISK_IO else []), "pipeline_2", "pipeline_4"]
    found: dict[str, Flags] = {name: {"teacher_hosting": name} for name in names}
    if HAS_DISK_IO:
        found["zero3_nvme"]["teacher_nvme"] = str(disk)
    return {**found, "pipeline_1": {"teacher_deepspeed": str(one_stage)}}


def teacher_folder(tokenizers: Path, folder: Path, config: Flags, seed: int = 3) -> Path:
    """A teacher in hub format in which nothing is neutral, with the tokenizer and the vocabulary of another one."""
    vocabulary = json.loads((tokenizers / "config.json").read_text())["vocab_size"]
    write_hub_folder(folder, {**config, "vocab_size": vocabulary}, seed, shards=3)
    for file in tokenizers.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@contextmanager
def joined() -> Iterator[DistContext]:
    """The world that this rank's environment describes, left at the end."""
    from megatron_tide.train.distributed import destroy_distributed, init_distributed

    world = init_distributed()
    try:
        yield world
    finally:
        destroy_distributed()


def loader_of(flags: Flags, world: DistContext) -> tuple[Strategy, MicrobatchLoader]:
    """The strategy of a run and its micro-batchess on this rank, by the product's own data path."""
    config = from_flat(flags)
    inputs = read_run_inputs(config, world.size)
    return inputs.strategy, make_loader(config, inputs, world)


def teacher_of(flags: Flags, strategy: Strategy, world: DistContext) -> Any:
    """The teacher of a run, hosted as its flags say."""
    config = from_flat(flags)
    return build_teacher(config.paths.teacher, config.teacher, strategy, world)


def start_counting() -> None:
    """From here on :func:`living_bytes` counts, and not what there is already."""
    gc.collect()
    gc.freeze()


def living_bytes() -> int:
    """Bytes of all tensors with memory since :func:`start_counting`: each storage once, however many look at it."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Collectives(TorchDispatchMode):
    """Counts what this rank sends and receives, by kind, whoever asks for it: ``with Collectives() as calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(func._opname)
        return func(*args, **(kwargs or {}))


def rss_bytes(kind: str = "RssAnon") -> int:
    """This process's resident memory: ``RssAnon``, without files that are mapped; ``VmRSS``, with them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {kind} in /proc/self/status")
