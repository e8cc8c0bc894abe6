"""What a GPU does for speed: sizes of pieces by its memory, and a switch for each part, to measure what it gives.

    MEGATRON_TIDE_OFF=head,masks torchrun ... -m megatron_tide.distill ...

None of it changes what is computed: numbers differ by rounding at most. On a CPU nothing of it is on.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VARIABLE = "MEGATRON_TIDE_OFF"
MIB, GIB = 2**20, 2**30

# Names that VARIABLE takes, beside --no-compile-layers (the student's layers) and A2D_GRAPHS=0 (generation).
SWITCHES = {
    "head": "logits in pieces of up to 512 MiB, in multiples of 128 rows or columns",
    "layerwise": "the replicated teacher takes all micro-batches of a step layer by layer, up to 16,384 tokens at once",
    "sum": "the weighted sum over a token's experts as one compiled kernel",
    "masks": "flex_attention's lists of tiles made on the host, by the loader's thread",
    "upload": "micro-batches copied to the GPU by the loader's thread, before their step",
    "adam": "the fused AdamW kernel",
}


def is_on(name: str) -> bool:
    """Whether a part is not switched off.

    Raises:
        ValueError: the variable names something else.
    """
    assert name in SWITCHES, name
    off = {word.strip() for word in os.environ.get(VARIABLE, "").split(",")} - {""}
    if unknown := sorted(off - SWITCHES.keys()):
        raise ValueError(f"{VARIABLE}: unknown part {unknown[0]!r}; use of {', '.join(SWITCHES)}")
    return name not in off


def keep_kernels_private() -> None:
    """What torch compiles is kept in this user's cache. By default that is a folder in /tmp of a name that others know,
    and can make first: torch runs what it finds there.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  # Path's fails without a home
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache}/megatron_tide/torchinductor")


@dataclass(frozen=True)
class PieceSizes:
    """Work is cut into pieces: at most ``logit_bytes`` of fp32 logits, in multiples of ``multiple`` rows or columns
    (matmuls of odd widths are slow on a GPU); at most ``tokens`` through a layer's experts (enough rows for each).
    """

    logit_bytes: int
    multiple: int
    tokens: int


ON_CPU = PieceSizes(logit_bytes=64 * MIB, multiple=1, tokens=4096)


def on_gpu(memory: int) -> PieceSizes:
    """For a GPU of so many bytes: the largest sizes from 80 GB on."""
    head, layerwise = is_on("head"), is_on("layerwise")
    return PieceSizes(
        logit_bytes=max(ON_CPU.logit_bytes, min(512 * MIB, memory // 144)) if head else ON_CPU.logit_bytes,
        multiple=128 if head else 1,
        tokens=max(ON_CPU.tokens, min(16384, memory // (4608 * 1024))) if layerwise else ON_CPU.tokens,
    )


def piece_sizes(device: torch.device) -> PieceSizes:
    return on_gpu(_memory(device.index)) if device.type == "cuda" else ON_CPU


@functools.cache
def _memory(index: int | None) -> int:
    import torch

    # Without one (tensors that stand in for a GPU's): as on a large one.
    return int(torch.cuda.get_device_properties(index).total_memory) if torch.cuda.is_available() else 80 * GIB
