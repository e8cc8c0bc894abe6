"""The ranks of a run: rank, device, and the few collectives that training needs in addition to DeepSpeed's.

Numbers that are on the CPU already (counts, a stop request) use a gloo group, so they cost no device synchronisation.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_tide.cli import say
from megatron_tide.ds_config import use_own_ninja
from megatron_tide.ds_ops import clear_locks
from megatron_tide.gpus import refuse_idle_gpu
from megatron_tide.ranks import again, on_main, stated
from megatron_tide.screen import words_of
from megatron_tide.train.network import loopback_store, name_interface
from megatron_tide.train.trace import Trace

LAUNCH = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}  # what a launcher sets
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
NOTICE = 60.0  # seconds until a rank says that it waits for the others


@dataclass(frozen=True)
class DistContext:
    """One rank of the run. ``host_group``: gloo group over all ranks; ``trace``: this rank's last activity."""

    rank: int
    size: int
    device: torch.device
    host_group: Any
    trace: Trace = field(default_factory=Trace)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print_rank0(self, line: str) -> None:
        """Print a line on rank 0."""
        if self.is_main:
            say(line, flush=True)

    def sum_over_ranks(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks (float64, on the host)."""
        total = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Mean of each value over all ranks, which have the same names (on the host)."""
        if not values:
            return {}
        return {name: total / self.size for name, total in zip(values, self.sum_over_ranks(list(values.values())))}

    def sum_tensor_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a small device tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """``work()`` of rank 0, on every rank: its value, or its error."""
        return on_main(self, work)

    def on_all(self, work: Callable[[], Any]) -> Any:
        """``work()`` of this rank; where it fails on some rank, every rank raises an error (a collective)."""
        value, own = None, None
        try:
            value = work()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            own = error
        failures = self.gather_on_all(own and stated(own))
        if own is not None:
            raise own
        for failure in failures:
            if failure is not None:
                raise again(failure)
        return value

    def gather_on_all(self, value: Any) -> list[Any]:
        """Every rank's ``value``, ordered by rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_object_to_main(self, value: Any) -> list[Any]:
        """Every rank's ``value``, ordered by rank, on rank 0; [] on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.host_group)
        return values if self.is_main else []


def launched_ranks() -> int:
    """Number of ranks according to the launcher's environment; 1 without a launcher.

    Raises:
        ValueError: a variable that is not a number, or a rank outside its world size.
    """
    found = {name: os.environ.get(name, default) for name, default in LAUNCH.items()}
    for name, value in found.items():
        if not value.isdecimal():
            raise ValueError(f"{name}={value!r} in the environment: it must be an integer set by a launcher; unset it")
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    if int(found["MASTER_PORT"]) > 65535:
        raise ValueError(f"MASTER_PORT={found['MASTER_PORT']} in the environment: no port has this number; unset it")
    if rank >= size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={size} in the environment: ranks count from 0; unset both")
    return size


def init_distributed() -> DistContext:
    """Join the process group that torchrun, the deepspeed launcher or Slurm describes; a group of one without them.

    Raises:
        ValueError: as :func:`launched_ranks`.
    """
    ranks = launched_ranks()
    if ranks > 1 and "RANK" not in os.environ:  # the others would be waited for
        raise ValueError(f"WORLD_SIZE={ranks} in the environment without RANK: no launcher set it; unset it")
    own_port = ranks == 1 and "MASTER_PORT" not in os.environ
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, alone)
    refuse_idle_gpu()
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it had to guess
    use_own_ninja()
    trace = Trace()
    trace.watch_collectives()
    _form_group("nccl" if cuda else "gloo")
    if own_port:
        os.environ.pop("MASTER_PORT", None)  # a process started from here would find that port in use
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    world = DistContext(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        host_group=dist.new_group(backend="gloo"),
        trace=trace,
    )
    if cuda:
        _refuse_shared_gpus(world)
    return world


def _form_group(backend: str) -> None:
    """Join the process group of the environment. OSError, one line, where the ranks do not find each other."""
    name_interface()
    clear_locks()  # of ops that DeepSpeed loads here
    here = loopback_store()
    rank, size, address, port = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    place = f"at {address}, port {port}"
    most = f"{COLLECTIVE_TIMEOUT.seconds // 60} minutes at most"
    waits = f"rank {rank} of {size} waits for the others {place}, {most}: see whether all have started"
    notice = threading.Timer(NOTICE, say, (waits,), {"file": sys.stderr, "flush": True})
    notice.daemon = True
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if backend == "nccl":
        _take_gpu()
    try:
        if size != "1":
            notice.start()
        if not dist.is_initialized():
            settings = {"timeout": COLLECTIVE_TIMEOUT, "verbose": False, "auto_mpi_discovery": False}
            with contextlib.redirect_stdout(io.StringIO()):  # it announces the op it loaded, on every rank
                deepspeed.init_distributed(dist_backend=backend, **settings)
    except dist.DistError as error:
        raise OSError(
            f"rank {rank} of {size}: the ranks do not find each other {place} "
            f"({words_of(error).splitlines()[0]}); see what the others say, or whether they started"
        ) from None
    finally:
        notice.cancel()
    del here  # the group's own store, of the same server, lives on


def _take_gpu() -> None:
    """Make this rank's GPU the current one: that of LOCAL_RANK, or the only one that its scheduler lets it see."""
    local, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if seen == 1:
        local = 0
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it too
    if local >= seen:
        raise ValueError(
            f"LOCAL_RANK={local} in the environment, but this process sees {seen} GPUs: start at most {seen} ranks per "
            "node, or let each of them see one GPU"
        )
    torch.cuda.set_device(local)


def _refuse_shared_gpus(world: DistContext) -> None:
    """Two ranks on one GPU are a mistake that NCCL reports late and in words of its own (a collective)."""
    mine = f"{socket.gethostname()}, GPU {torch.cuda.get_device_properties(world.device).uuid}"
    found = world.gather_on_all(mine)
    if found.count(mine) > 1:
        ranks = [rank for rank, place in enumerate(found) if place == mine]
        raise ValueError(f"ranks {ranks} share one GPU ({mine}): start one rank per GPU (NPROC, --nproc-per-node)")


def destroy_distributed() -> None:
    """Leave the group. A group of one lives as long as its process, for the next run there: DeepSpeed keeps it."""
    if not dist.is_initialized():
        return
    if dist.get_world_size() == 1:
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)
    else:
        dist.destroy_process_group()
