"""Held-out likelihood of models in one table: the diffusion bound in bits per byte, with the same masks for every row.

    python tools/evaluate.py --data runs/quickstart/test-data --teacher runs/quickstart/teacher \\
        --student start=runs/quickstart/student --student tide-cross=runs/quickstart/tide-cross --json scores.json

A model is a folder in hub format, a hub name, or a checkpoint of the trainer, written PATH or NAME=PATH. Students read
the student's half of two-sided prepared data and teachers the teacher's, so that all of them guess the same bytes from
the same bytes. Intervals are 95 % bootstrap over samples; differences are paired, to the first student.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_tide import cli


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    path: str
    report: Any
    seconds: float


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared folder that no model was trained on")
    parser.add_argument(
        "--student", action="append", default=[], metavar="[NAME=]PATH", help="may be given several times"
    )
    parser.add_argument(
        "--teacher", action="append", default=[], metavar="[NAME=]PATH", help="may be given several times"
    )
    parser.add_argument(
        "--teacher-context",
        choices=("staircase", "full", "block_causal"),
        default="staircase",
        help="what teachers attend to; the staircase gives them what students see [staircase]",
    )
    parser.add_argument("--samples", type=int, default=0, help="of the data, spread evenly over it [all]")
    parser.add_argument("--draws", type=int, default=8, help="timesteps a sample, one in each of as many strata [8]")
    parser.add_argument("--seed", type=int, default=0, help="of masks and bootstrap [0]")
    parser.add_argument("--batch-size", type=int, default=8, help="samples at once; changes speed only [8]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="precision [float32]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--json", metavar="FILE", help="also write everything, by timestep too, as JSON")
    arguments = parser.parse_args(argv)
    if not arguments.student and not arguments.teacher:
        parser.error("give at least one --student or --teacher")
    return arguments


def main(argv: list[str]) -> int:
    arguments = arguments_of(argv)
    from megatron_tide.data import PreparedData
    from megatron_tide.evaluate import student_side, teacher_side

    data = PreparedData.open(arguments.data)
    models = [(text, student_side(data)) for text in arguments.student]
    models += [(text, teacher_side(data, arguments.teacher_context)) for text in arguments.teacher]
    names = [named(text)[0] for text, _ in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}; tell them apart with NAME=PATH")
    rows = [measure(text, side, data, arguments) for text, side in models]
    print(table(rows))
    if arguments.json:
        content = json.dumps(record(rows, data, arguments), indent=1)
        Path(arguments.json).write_text(content + "\n", encoding="utf-8")
    return 0


def named(text: str) -> tuple[str, str]:
    """``NAME=PATH`` or ``PATH`` -> (name, path)."""
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)


def measure(text: str, side: Any, data: Any, arguments: argparse.Namespace) -> Row:
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.data.progress import Progress
    from megatron_tide.evaluate import evaluate_likelihood
    from megatron_tide.release import DTYPES, open_model

    name, path = named(text)
    opened = open_model(path, DTYPES[arguments.dtype], arguments.device)
    if load_tokenizer(opened.folder).fingerprint != data.manifest[side.name]["fingerprint"]:
        raise ValueError(f"{path}: {arguments.data} was prepared for a {side.name} with another tokenizer")
    started = time.perf_counter()
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or Progress(total, name)
        bar.update(done)

    report = evaluate_likelihood(
        opened.model,
        data,
        side,
        samples=arguments.samples,
        draws=arguments.draws,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=progress,
    )
    bar.close()
    return Row(name, path, report, time.perf_counter() - started)


def first_student(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.report.side == "student"), None)


def table(rows: list[Row]) -> str:
    """For people: one line a model."""
    base, width = first_student(rows), max(5, *(len(row.name) for row in rows))
    head = (
        f"{'model':<{width}}  {'side':<7}  {'bits per byte':<25}  {'less the first student':<27}  masked-token accuracy"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        difference = "" if base is None or row is base else f"{row.report.minus(base.report):+}"
        lines.append(
            f"{row.name:<{width}}  {row.report.side:<7}  {row.report.bits_per_byte!s:<25}  {difference:<27}  "
            f"{row.report.accuracy}"
        )
    return "\n".join(lines)


def record(rows: list[Row], data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """For programs: settings, and every model with its numbers."""
    base = first_student(rows)
    return {
        "data": {"folder": str(data.folder), "fingerprint": data.fingerprint},
        "settings": {
            "samples": rows[0].report.samples,
            "draws": arguments.draws,
            "seed": arguments.seed,
            "teacher_context": arguments.teacher_context,
            "dtype": arguments.dtype,
        },
        "models": [
            {
                "name": row.name,
                "path": row.path,
                **row.report.to_dict(),
                "minus_first_student": row.report.minus(base.report).to_dict() if base else None,
                "seconds": row.seconds,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    cli.run(main)
