"""Where ranks listen: on 127.0.0.1 if all of them are on this machine, else on one network interface.

Over several nodes gloo takes the interface of the host's own name, on many machines the loopback, where no other node
reaches it; NCCL looks for one itself, or takes NCCL_SOCKET_IFNAME.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Sequence

import torch.distributed as dist

from megatron_tide.cli import say

LOOPBACK = ("127.0.0.1", "localhost")
OPEN = (
    "warning: torchrun's port {} is open on every network interface, and whoever reaches it controls this run; close "
    "it by a firewall, or start torchrun as --help shows"
)
SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def name_interface() -> None:
    """Set GLOO_SOCKET_IFNAME for ranks on several nodes, if it is not set: as NCCL's, or the way to MASTER_ADDR."""
    address = os.environ["MASTER_ADDR"]
    if on_one_machine() or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    fitting = matching(os.environ.get("NCCL_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()])
    way = interface_towards(address)
    chosen = way if way in fitting else next(iter(fitting), None)
    if chosen:
        os.environ["GLOO_SOCKET_IFNAME"] = chosen


def on_one_machine() -> bool:
    """Whether all ranks are on this machine, by the launcher's count of those here or by the address."""
    size = os.environ["WORLD_SIZE"]
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, the deepspeed launcher's
    return os.environ["MASTER_ADDR"] in LOOPBACK or size in ("1", here)


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The interfaces that NCCL_SOCKET_IFNAME means: prefixes ``ib,eth``, names ``=ib0``, all but ``^docker``."""
    excluded, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    words = [word for word in pattern.lstrip("^=").split(",") if word]

    def named(name: str) -> bool:
        return name in words if exact else name.startswith(tuple(words))

    return [name for name in names if named(name) != excluded] if words else list(names)


def interface_towards(address: str) -> str | None:
    """The interface through which this machine reaches an address (IPv4); None where that is unknown."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def loopback_store() -> dist.TCPStore | None:
    """Where all ranks are on this machine: rank 0's store, on 127.0.0.1; else None. Sets MASTER_PORT if it is missing,
    and MASTER_ADDR, unless the store is torchrun's, which tells that it is open.

    torch's own store listens on every interface, and takes what anyone writes; torch gives it no address, but takes a
    socket that listens already, and a second store on that port joins it. gloo and NCCL listen on one interface.
    """
    if not on_one_machine():
        return None
    for backend in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    is_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_open:
        os.environ["MASTER_ADDR"] = LOOPBACK[0]
    if os.environ["RANK"] != "0" or dist.is_initialized():
        return None
    port = os.environ.get("MASTER_PORT", "0")
    if is_open:
        say(OPEN.format(port), file=sys.stderr)
        return None
    try:
        listener = socket.create_server((LOOPBACK[0], int(port)), backlog=2048)
    except OSError as error:
        raise OSError(f"MASTER_PORT={port}: {os.strerror(error.errno or 0)}; set another one") from None
    os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
    return dist.TCPStore(
        LOOPBACK[0],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
