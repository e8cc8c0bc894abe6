"""Compile the DeepSpeed ops that this machine needs, once, and show the progress.

DeepSpeed compiles an op on first use, for minutes and without output, and a killed build leaves a lock for which the
next one waits forever. This command compiles before training: on a machine without a GPU the shared-memory
communication op; with --offload the CPU Adam; with --disk asynchronous disk I/O, which needs the headers of libaio
(apt-get install libaio-dev). An op that is already compiled is kept. Every recipe runs this command.

Examples:
  python -m megatron_tide build-ops --offload --disk
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tide.cli import flag


@dataclass(frozen=True, kw_only=True)
class Args:
    offload: bool = flag(False, "Also compile the CPU Adam, for ds_configs with offload_optimizer")
    disk: bool = flag(False, "Also compile asynchronous disk I/O, for a teacher on NVMe")


def run(args: Args) -> None:
    from megatron_tide.ds_ops import build_ops

    build_ops(offload=args.offload, disk=args.disk)
