"""Checkpoint keys: one table per model, used in both directions.

A table names, for every key of a public checkpoint, the tensor of our module that holds it and the slice of it.
Reading and writing walk the same table, so what comes in goes out bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

_EXPERTS = re.compile(r"^(?P<block>.*\.mlp\.experts)\.(?P<projection>gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint's tensor lives: a whole tensor of the module, or (``index``) one expert of a stacked one."""

    name: str
    index: int | None = None

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """The slot's view, given the module's tensors by name."""
        tensor = tensors[self.name]
        return tensor if self.index is None else tensor[self.index]


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint stores of a module, by our names: parameters and buffers, a tied one under its first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def checkpoint_table(tensors: dict[str, Tensor]) -> dict[str, Slot]:
    """Public checkpoint key -> slot, for a module's tensors, in the order they are written."""
    table = {}
    for name, tensor in tensors.items():
        stacked = _EXPERTS.match(name)
        if stacked is None:
            table[name] = Slot(name)
            continue
        for expert in range(len(tensor)):
            table[f"{stacked['block']}.{expert}.{stacked['projection']}.weight"] = Slot(name, expert)
    return table


def keeps_precision(name: str) -> bool:
    """Whether a module's tensor is stored and held in the precision it came in, whatever the rest is cast to."""
    return name.endswith(".expert_bias")


def tied_aliases(module: nn.Module) -> dict[str, str]:
    """Names that share another name's tensor -> that name: keys a checkpoint may carry as well, as equal copies."""
    kept = {id(tensor): name for name, tensor in module_tensors(module).items()}
    state = module.state_dict(keep_vars=True)
    return {name: kept[id(tensor)] for name, tensor in state.items() if kept[id(tensor)] != name}
