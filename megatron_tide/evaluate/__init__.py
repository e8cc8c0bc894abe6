"""Checkpoint -> scores: the held-out diffusion bound of student and teacher, in bits per byte.

Benchmarks need lm-eval and are imported from modules of their own: ``harness`` runs them, ``generators`` are the models
that answer, ``benchmark_presets`` the paper's settings and numbers. Names here are fetched on first use: the tables of
scores need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tide.evaluate.bootstrap import Estimate
    from megatron_tide.evaluate.likelihood import LikelihoodReport, evaluate_likelihood, scoring_inputs, validate

__all__ = ["Estimate", "LikelihoodReport", "evaluate_likelihood", "scoring_inputs", "validate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'bootstrap' if name == 'Estimate' else 'likelihood'}"), name)
