"""Batches shared over copies of a model: the results of one, in order; every copy works; an error ends it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tide import machine
from megatron_tide.commands import evaluate
from megatron_tide.generate.copies import shared


def models(count: int) -> list[Any]:
    return [SimpleNamespace(name=number, device=torch.device("cpu")) for number in range(count)]


def test_every_copy_takes_items_and_results_are_in_order() -> None:
    together = threading.Barrier(3)  # passes only when three items are under way at once

    def work(model: Any, item: int) -> tuple[int, int]:
        if item < 3:
            together.wait(timeout=120)
        return model.name, item * item

    found = list(shared(models(3), work, range(9)))
    assert [square for _, square in found] == [item * item for item in range(9)]
    assert {name for name, _ in found[:3]} == {0, 1, 2}
    assert list(shared(models(1), lambda model, item: (model.name, item), [4, 2])) == [(0, 4), (0, 2)]


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_ends_it(count: int) -> None:
    begun: list[int] = []

    def work(model: Any, item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ValueError("item 1 is broken")
        return item

    with pytest.raises(ValueError, match="item 1"):
        list(shared(models(count), work, range(500)))
    assert len(begun) < 500


def test_evaluation_takes_what_suits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate.Where.of(evaluate.Args()) == evaluate.Where(["cpu"], 8, torch.float32)
    given = evaluate.Args(batch_size=3, dtype="bfloat16")
    assert evaluate.Where.of(given) == evaluate.Where(["cpu"], 3, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    every = ["cuda", "cuda:1", "cuda:2"]
    assert evaluate.Where.of(evaluate.Args()) == evaluate.Where(every, 64, torch.bfloat16)
    assert machine.devices_of("cuda") == every
    assert machine.devices_of("cuda:1") == ["cuda:1"]
    assert machine.devices_of("cpu") == ["cpu"]
