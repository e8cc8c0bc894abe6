"""What a machine has: GPU memory, host memory, free disk; told in flags, or looked up on this one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

GIB, GB = 2**30, 10**9  # memory is sold in the first, disks in the second
CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True)
class Machine:
    """``nodes`` equal nodes with ``ranks`` processes each.

    Bytes: of each GPU (0: there is none, a rank computes on the host), of a node's memory, and free on a node's disk
    where a teacher may lie (0: no such disk).
    """

    ranks: int
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int = 0
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.ranks * self.nodes

    @property
    def has_gpus(self) -> bool:
        return self.gpu_bytes > 0

    def describe(self) -> str:
        gpus = f"{self.ranks} GPU(s) of {self.gpu_bytes / GIB:.0f} GiB"
        what = gpus if self.has_gpus else f"no GPU, {self.ranks} rank(s)"
        disk = f", {self.disk_bytes / GB:.0f} GB free on disk" if self.disk_bytes else ""
        count = "" if self.nodes == 1 else f"{self.nodes} nodes of "
        return f"{count}{what}, {self.host_bytes / GIB:.0f} GiB of host memory{disk}"


def this_machine(ranks: int, nodes: int, disk: Path | None) -> Machine:
    """The node this process runs on, with ``ranks`` processes; ``disk``: a folder where a teacher may lie."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() else 0
    return Machine(
        ranks=ranks,
        gpu_bytes=gpu,
        # What ranks like this one have imported by now is in a plan's numbers too, so it counts as free here.
        host_bytes=free_memory() + ranks * _field(PROC / "self/status", "RssAnon"),
        disk_bytes=shutil.disk_usage(disk).free if disk else 0,
        nodes=nodes,
    )


def free_memory() -> int:
    """Bytes of memory that this node still has, or the container or job on it, if that has less."""
    return min([_field(PROC / "meminfo", "MemAvailable"), *_left_by_groups()])


def _left_by_groups() -> Iterator[int]:
    """What each control group around this process has left; nothing from one that sets no limit."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text())  # "max" is no number
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield most - int((folder / used).read_text()) + int(stat[cached])  # cached files are given up when asked
    except (OSError, ValueError, KeyError):
        return


def _field(path: Path, name: str) -> int:
    """A field of a file of ``Name:   123 kB`` lines, in bytes."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
