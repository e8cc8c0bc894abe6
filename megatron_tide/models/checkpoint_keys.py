"""Checkpoint keys: a family's table of them, used in both directions.

A table names, for every key of a public checkpoint, the tensor of our module that holds it and the slice of it.
Reading and writing walk the same table, so reading and writing are exact inverses, bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_tide.models.families import Family

INDEX = "{index}"


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint's tensor lives: a complete tensor of the module, or (``index``) one slice of a stacked one."""

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


def checkpoint_table(tensors: dict[str, Tensor], family: Family) -> dict[str, Slot]:
    """Public checkpoint key -> slot, for a module's tensors, in the order they are written.

    ``family.checkpoint_keys`` maps a pattern of our names to the template of the public key; ``{index}`` in it numbers
    the slices of a stacked tensor. Names that no pattern matches are public as they are.
    """
    table: dict[str, Slot] = {}
    for name, tensor in tensors.items():
        key = name
        for pattern, template in family.checkpoint_keys.items():
            if found := re.fullmatch(pattern, name):
                key = found.expand(template)
        if INDEX in key:
            table |= {key.replace(INDEX, str(index)): Slot(name, index) for index in range(len(tensor))}
        else:
            table[key] = Slot(name)
    return table


def tied_aliases(module: nn.Module) -> dict[str, str]:
    """Tied names -> the name that owns the tensor: keys that a checkpoint may also contain, as equal copies."""
    kept = {id(tensor): name for name, tensor in module_tensors(module).items()}
    state = module.state_dict(keep_vars=True)
    return {name: kept[id(tensor)] for name, tensor in state.items() if kept[id(tensor)] != name}
