"""Batches shared over copies of a model, one per GPU."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared(models: Sequence[Any], work: Callable[[Any, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``work(model, item)`` of every item, in their order: a copy of the model takes the next item when it is free.

    With one model this is a plain loop. Where ``work`` depends on weights and item only, the results are those of one
    model. An error ends it after the items under way.
    """
    if len(models) == 1:
        yield from (work(models[0], item) for item in items)
        return
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for model in models:
        free.put(model)

    def take(item: Item) -> Result:
        model = free.get()
        try:
            device = model.device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return work(model, item)
        finally:
            free.put(model)

    pool = ThreadPoolExecutor(len(models))
    try:
        yield from pool.map(take, items)
    finally:
        pool.shutdown(cancel_futures=True)
