"""One file per command: its arguments, and a ``run`` that calls the package. ``python -m megatron_tide`` lists them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from megatron_tide.cli import flag, flag_name

STUDENT_LENGTH, TEACHER_LENGTH, BLOCK = 512, 1024, 32  # tokens, published
COVERAGE_FLOOR = 0.98  # of a sample's bytes for a bridge, of the responses' for data
PRECISIONS = ("bfloat16", "float32")


def dtype_flag() -> Any:
    """The flag of several commands for the precision of weights, which follows the device."""
    shown = "bfloat16 on a GPU, else float32"
    return flag(None, "Precision of the weights", choices=PRECISIONS, shown=shown)


def mask_flag(side: str) -> Any:
    """The flag of several commands that names the mask token of the student or the teacher."""
    return flag(None, f"Mask token or id of the {side}, if its tokenizer defines none", metavar="TOKEN")


def refuse_unused(args: Any, where: str, names: Iterable[str] | None = None) -> None:
    """ValueError for a flag of ``args`` (``names`` of them; None: any) that is set though it applies to ``where`` only,
    which is not asked for: it would be passed over without a word.
    """
    for info in fields(args):
        if (names is None or info.name in names) and getattr(args, info.name) != info.default:
            raise ValueError(f"{flag_name(info)} applies to {where}")
