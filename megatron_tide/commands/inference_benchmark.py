"""Measure memory and speed of student and teacher, one prompt at a time, each in a fresh process.

The report shows the result next to the published comparison ("22 times smaller, 5.2 times faster").

Examples:
  python -m megatron_tide inference-benchmark --student runs/quickstart/hf --teacher runs/quickstart/teacher \\
      --dtype float32 --new-tokens 96 --out runs/quickstart/inference_benchmark.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say
from megatron_tide.commands import PRECISIONS, mask_flag
from megatron_tide.machine import DEVICE_HELP, device_of

PROMPT = "Write a Python function that returns the sum of a list of numbers."


@dataclass(frozen=True, kw_only=True)
class Args:
    student: str = flag(
        ..., "Student: release, hub-format folder, hub name or training checkpoint", metavar="MODEL", reads="model"
    )
    teacher: str = flag(..., "Teacher, in the same forms", metavar="MODEL", reads="model")
    out: Path = flag(
        ...,
        "JSON file to write; the report looks for RUN/inference_benchmark.json",
        metavar="FILE",
        writes="file",
        keys=("student",),
    )
    student_mask: str | None = mask_flag("student")
    teacher_mask: str | None = mask_flag("teacher")
    dtype: str = flag("bfloat16", "Precision of the weights", choices=PRECISIONS)
    device: str = flag("auto", DEVICE_HELP)
    prompt: str = flag(PROMPT, "Prompt for both models", metavar="TEXT")
    new_tokens: int = flag(256, "Number of tokens per answer", low=1, high=1 << 24)
    repeats: int = flag(3, "Number of timed answers", low=1)


def run(args: Args) -> None:
    from megatron_tide.evaluate.inference_benchmark import compare

    names = ("dtype", "prompt", "new_tokens", "repeats")
    settings = {name: getattr(args, name) for name in names} | {"device": device_of(args.device)}
    found = compare((args.student, args.student_mask), (args.teacher, args.teacher_mask), settings)
    found.write(args.out)
    say("\n".join(found.summary()))
