"""``ranks.py NODES MODULE FLAGS...``: how many GPUs this machine has, and how many ranks `python -m MODULE FLAGS` gets.

One rank per GPU; for training fewer where the global batch cannot be divided among so many.
"""

from __future__ import annotations

import sys

from megatron_tide import cli, distill
from megatron_tide.__main__ import command
from megatron_tide.gpus import count_gpus, fitting_ranks


def main(argv: list[str]) -> None:
    nodes, module, flags = int(argv[0]), argv[1].split(), argv[2:]
    args = cli.parse(command(module[1]) if len(module) > 1 else distill, flags)
    gpus = count_gpus()
    if not hasattr(args, "run"):  # no training: any number of ranks
        print(gpus, max(1, gpus))
        return
    train = args.run.train
    ranks = fitting_ranks(gpus, train.global_batch_size, train.micro_batch_size, nodes)
    if ranks < gpus:
        print(
            f"note: {ranks} of {gpus} GPUs are used: a batch of {train.global_batch_size} in micro-batches of "
            f"{train.micro_batch_size} cannot be divided among all of them",
            file=sys.stderr,
        )
    print(gpus, ranks)


if __name__ == "__main__":
    cli.run(main)
