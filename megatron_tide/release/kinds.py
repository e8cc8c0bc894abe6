"""What a release consists of, by model type: which code travels along, and who must be able to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import megatron_tide.models

MODELS = Path(megatron_tide.models.__file__).parent


@dataclass(frozen=True)
class Kind:
    """``code``: files copied beside the weights. ``auto_map``: config.json's entry that makes transformers use them.

    ``prober``: how the parity gate's fresh process loads the folder (a key of ``probe.LOADERS``), and ``needs_package``
    whether this project must be importable there.
    """

    code: tuple[Path, ...]
    auto_map: dict[str, str]
    prober: str
    needs_package: bool


SELF_CONTAINED = Kind(
    code=tuple(MODELS / name for name in ("a2d_qwen3.py", "generation_a2d.py", "decoding_a2d.py")),
    auto_map={"AutoConfig": "a2d_qwen3.A2DQwen3Config", "AutoModelForMaskedLM": "a2d_qwen3.A2DQwen3LMHeadModel"},
    prober="transformers",
    needs_package=False,
)
# The public llada2_moe format: code for it is published elsewhere, so the folder holds weights and tokenizer.
WEIGHTS_ONLY = Kind(code=(), auto_map={}, prober="package", needs_package=True)

KINDS: dict[str, Kind] = {"a2d-qwen3": SELF_CONTAINED, "llada2_moe": WEIGHTS_ONLY}
