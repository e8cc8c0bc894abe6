"""Run programs that a model wrote, without privileges and without harm (Linux 5.13 or newer)."""

from megatron_tide.sandbox.run import LIMITS, WORKER, Limits, Outcome, run_program, run_programs
from megatron_tide.sandbox.self_test import failed_self_tests, require_sandbox

__all__ = [
    "LIMITS",
    "WORKER",
    "Limits",
    "Outcome",
    "failed_self_tests",
    "require_sandbox",
    "run_program",
    "run_programs",
]
