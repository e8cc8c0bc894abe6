"""Checkpoint -> scores: the held-out diffusion bound of student and teacher, in bits per byte.

Benchmarks need lm-eval and are imported from modules of their own: ``harness`` runs them, ``generators`` are the models
that answer, ``benchmark_presets`` the paper's settings and numbers.
"""

from megatron_tide.evaluate.bootstrap import Estimate
from megatron_tide.evaluate.likelihood import LikelihoodReport, evaluate_likelihood, scoring_inputs, validate

__all__ = ["Estimate", "LikelihoodReport", "evaluate_likelihood", "scoring_inputs", "validate"]
