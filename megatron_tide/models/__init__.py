"""Noised tokens -> log-probabilities: student, teacher, the head on masked rows, checkpoint folders.

``load_model`` and the like need transformers, which takes seconds to import: they are fetched on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_tide.fast import keep_kernels_private
from megatron_tide.models.head import rows_per_slice, score_rows, target_logprobs
from megatron_tide.models.hidden_states import compile_layers, masked_hidden_states, recompute_layers

if TYPE_CHECKING:
    from megatron_tide.models.families import fresh_model, generation_of, meta_model, parameter_count, read_config
    from megatron_tide.models.load import DTYPES, load_model, resolve_folder, weights_sha256, write_folder

keep_kernels_private()
__all__ = [
    "DTYPES",
    "compile_layers",
    "fresh_model",
    "generation_of",
    "load_model",
    "masked_hidden_states",
    "meta_model",
    "parameter_count",
    "read_config",
    "recompute_layers",
    "resolve_folder",
    "rows_per_slice",
    "score_rows",
    "target_logprobs",
    "weights_sha256",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load = import_module(f"{__name__}.load")
    return getattr(load if hasattr(load, name) else import_module(f"{__name__}.families"), name)
