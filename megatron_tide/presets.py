"""``--preset``: named sets of flags, as differences from the defaults (``config``), by pipeline.

The published settings (TIDE section 4, its hyperparameter table and scripts) are those of two pipelines: tokenizers
that differ (A: LLaDA2) and one shared tokenizer (B: WeDLM). Which one a run is, its bridge says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tide.choices import Choice, Registry
from megatron_tide.files import read_json

Flags = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Flags for all runs (``always``), for those with two tokenizers or a shared one, and of these by strategy."""

    always: Flags = field(default_factory=dict)
    two_tokenizers: Flags = field(default_factory=dict)
    one_tokenizer: Flags = field(default_factory=dict)
    one_tokenizer_by_strategy: Mapping[str, Flags] = field(default_factory=dict)

    def flags(self, strategy: str, bridge: str) -> dict[str, Any]:
        """The flags for a strategy and the folder of a bridge ("" for none)."""
        shared = _is_shared(bridge)
        if shared is None:
            return dict(self.always)
        if not shared:
            return {**self.always, **self.two_tokenizers}
        return {**self.always, **self.one_tokenizer, **self.one_tokenizer_by_strategy.get(strategy, {})}


# A: 8 GPUs x 8 samples are the defaults. B: 8 GPUs x 10, in micro-batches that 1, 2, 4, 8 and 16 ranks can share.
PAPER = Preset(
    one_tokenizer={"global_batch_size": 80, "micro_batch_size": 5},
    one_tokenizer_by_strategy={
        "tide-cross": {"chunk_objective": "none", "distribution_objective": "reverse_kl"},
        "tide-shared": {"tidal_midrange": True},
    },
)
PAPER_SCRIPT = Preset(
    two_tokenizers={"temperature": 5.0},
    one_tokenizer=PAPER.one_tokenizer,
    one_tokenizer_by_strategy=PAPER.one_tokenizer_by_strategy,
)
# What won on five seeds with tide-bridge, or was not decided and wastes less (benchmarks/results/study.json; README).
OURS = Preset(
    always={
        "masking": "synchronous",  # H5, not decided
        "timesteps": "block",  # H6, not decided
        "timestep_sampling": "stratified",
        "mask_count": "exact",
        "teacher_context": "staircase",  # H4
        "compdemo": False,  # H7a
        "tidal": "off",  # H7b
        "compdemo_split": "exact",  # for those who switch it on
        "warmup_ratio": 0.03,
    }
)

PRESETS = Registry(
    {
        "paper": Choice("the published setting of the run's pipeline (what its tokenizers say)", PAPER),
        "paper-script": Choice("the same, with its script's temperature where the tokenizers differ", PAPER_SCRIPT),
        "ours": Choice(
            "what won the study (README): unbiased masking of less variance, a teacher with the student's attention, "
            "no TIDAL and no CompDemo",
            OURS,
        ),
    }
)


def _is_shared(bridge: str) -> bool | None:
    """Whether a bridge is one between equal tokenizers; None without a readable one, which the run refuses later."""
    try:
        return bool(read_json(Path(bridge) / "manifest.json")["manifest"]["shared"]) if bridge else None
    except (ValueError, KeyError, TypeError):
        return None
