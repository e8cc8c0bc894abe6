"""One file per command: its arguments, and a ``run`` that calls the package. ``python -m megatron_tide`` lists them."""

from __future__ import annotations

from typing import Any

from megatron_tide.cli import flag


def mask_flag(side: str) -> Any:
    """The flag of several commands that names the mask token of the student or the teacher."""
    return flag(None, f"Mask token or id of the {side}, if its tokenizer defines none", metavar="TOKEN")
