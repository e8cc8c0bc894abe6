"""Checkpoint -> scores: the held-out diffusion bound of student and teacher, in bits per byte.

Benchmarks are in modules of their own, which need more: ``benchmarks`` (the paper's eight, by name), ``humaneval`` with
its ``sandbox``, ``lm_harness``, and ``answerers``, the models they ask.
"""

from megatron_tide.evaluate.bootstrap import Estimate
from megatron_tide.evaluate.likelihood import LikelihoodReport, evaluate_likelihood
from megatron_tide.evaluate.sides import Side, student_side, teacher_side
from megatron_tide.evaluate.validation import validate

__all__ = [
    "Estimate",
    "LikelihoodReport",
    "Side",
    "evaluate_likelihood",
    "student_side",
    "teacher_side",
    "validate",
]
