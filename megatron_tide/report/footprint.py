"""Memory and speed of student against teacher, measured: each in a fresh process, one prompt at a time.

    python -m megatron_tide.report.footprint --student runs/quickstart/hf --teacher runs/quickstart/teacher \\
        --dtype float32 --new-tokens 96 --out runs/quickstart/footprint.json

The published comparison ("22 times smaller, 5.2 times faster", TIDE, efficiency table) stands beside it in the report,
with what it was measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import megatron_tide
from megatron_tide import cli
from megatron_tide.files import read_json, write_json
from megatron_tide.machine import device_of, machine, versions
from megatron_tide.report.measure import Measured, add_flags, check

PACKAGE_ROOT = Path(megatron_tide.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Published:
    """A row of the paper's table: one H100, 256 new tokens."""

    name: str
    memory_gb: float
    seconds: float


PUBLISHED = (
    Published("student, Qwen3-0.6B-BD3LM", 1.4, 6.25),
    Published("teacher, LLaDA2.0-mini 16B", 31.3, 32.55),
    Published("autoregressive Qwen3-0.6B", 1.2, 4.99),
)
PUBLISHED_ON = "one NVIDIA H100, 256 new tokens"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What was measured, and how: ``settings`` and ``machine`` are for the reader."""

    student: Measured
    teacher: Measured
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    def ratios(self) -> dict[str, float]:
        """The teacher's weights, memory and seconds over the student's; without the last two where one cannot
        answer.
        """
        found = {"weights": self.teacher.weights_bytes / self.student.weights_bytes}
        if not (self.student.cannot or self.teacher.cannot):
            found["memory"] = self.teacher.memory_bytes / max(self.student.memory_bytes, 1)
            found["seconds"] = self.teacher.median_seconds / self.student.median_seconds
        return found


def read_footprint(path: Path) -> Footprint:
    """``footprint.json`` again. ValueError, one line, for a file that is no such thing."""
    content = read_json(path)
    try:
        content |= {side: Measured(**content[side]) for side in ("student", "teacher")}
        return Footprint(**{key.name: content[key.name] for key in fields(Footprint)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what python -m megatron_tide.report.footprint writes ({error!r})") from None


def write_footprint(path: Path, footprint: Footprint) -> None:
    write_json(path, {**asdict(footprint), "ratios": footprint.ratios()})


def measured_apart(path: str, flags: list[str]) -> Measured:
    """``measure`` of one model in a process of its own, so that no other model's memory counts.

    Raises:
        ValueError: with the last line that process wrote, when it failed.
    """
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="tide-footprint-") as folder:
        answer = Path(folder) / "measured.json"
        line = [sys.executable, "-m", "megatron_tide.report.measure", path, "--json", str(answer), *flags]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        finished = subprocess.run(line, env=environment, stderr=subprocess.PIPE, text=True)
        if finished.returncode:
            said = (finished.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
            raise ValueError(f"{path}: measuring it ended with status {finished.returncode}: {said}")
        return Measured(**json.loads(answer.read_text()))


def summary(footprint: Footprint) -> list[str]:
    """For people, a line each."""
    lines = []
    for name, side in (("student", footprint.student), ("teacher", footprint.teacher)):
        line = f"{name}: {side.parameters:,} parameters, {side.weights_bytes / 1e6:.1f} MB of weights, "
        if side.cannot:
            lines.append(f"{line}not measured further: {side.cannot}")
        else:
            seconds = f"{side.median_seconds:.2f} s for {side.tokens} tokens"
            lines.append(f"{line}{side.memory_bytes / 1e6:.1f} MB while answering, {seconds}")
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in footprint.ratios().items())
    return [*lines, f"teacher / student: {ratios}"]


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tide.report.footprint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--student", required=True, help="release, hub-format folder or checkpoint")
    parser.add_argument("--teacher", required=True, help="likewise")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="footprint.json of the run's folder")
    for side in ("student", "teacher"):
        parser.add_argument(
            f"--{side}-mask", metavar="TOKEN", help=f"the {side}'s mask token or id, where its tokenizer names none"
        )
    add_flags(parser)
    return parser.parse_args(argv)


def _mask(token: str | None) -> list[str]:
    return [] if token is None else ["--mask", token]


def main(argv: list[str]) -> int:
    args = arguments_of(argv)
    check(args)
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    knobs = {"dtype": args.dtype, "device": device_of(args.device), "prompt": args.prompt}
    knobs |= {"new_tokens": args.new_tokens, "repeats": args.repeats}
    flags = [word for name, value in knobs.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    footprint = Footprint(
        student=measured_apart(args.student, [*flags, *_mask(args.student_mask)]),
        teacher=measured_apart(args.teacher, [*flags, *_mask(args.teacher_mask)]),
        settings={**knobs, "batch": 1, "tokens_per_pass": 1},
        machine=machine(),
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    write_footprint(args.out, footprint)
    print("\n".join(summary(footprint)))
    return 0


if __name__ == "__main__":
    cli.run(main)
