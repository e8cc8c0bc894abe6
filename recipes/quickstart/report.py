"""The quickstart's last page: scores, completions, what it took; printed, and kept as report.json.

    python recipes/quickstart/report.py runs/quickstart --seed 42

Reads scores.json (tools/evaluate.py), completions.jsonl (tools/generate.py) and the stages' stamps (recipes/stage.py).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.files import read_json, write_json
from megatron_tide.machine import machine, versions
from megatron_tide.tables import read_rows


def stages(run: Path) -> dict[str, dict[str, Any]]:
    """Seconds and largest process of every stage, in the order they finished."""
    stamps = {path.stem: read_json(path, "run the recipe again") for path in (run / ".stages").glob("*.json")}
    ordered = sorted(stamps.items(), key=lambda item: item[1]["finished"])
    return {name: {key: stamp[key] for key in ("seconds", "peak_process_bytes")} for name, stamp in ordered}


def completions(run: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(run / "completions.jsonl")]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the recipe's folder")
    parser.add_argument("--seed", type=int, required=True, help="the recipe's seed, for the record")
    arguments = parser.parse_args(argv)
    scores = read_json(arguments.run / "scores.json", "tools/evaluate.py writes it")
    taken = stages(arguments.run)
    report = {
        "scores": {model["name"]: model for model in scores["models"]},
        "evaluation": {"data": scores["data"], **scores["settings"]},
        "completions": completions(arguments.run),
        "stages": taken,
        "seconds": sum(stage["seconds"] for stage in taken.values()),
        "peak_process_bytes": max(stage["peak_process_bytes"] for stage in taken.values()),
        "seed": arguments.seed,
        "versions": versions(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(arguments.run / "report.json", report)
    show(report, arguments.run)
    return 0


def show(report: dict[str, Any], run: Path) -> None:
    width = max(len(name) for name in report["scores"])
    print(f"\nheld-out bits per byte, {report['evaluation']['samples']} test samples, the same masks for every row")
    print(f"{'':{width}}  bits per byte (95 %)       less the start (paired, 95 %)  masked-token accuracy")
    for name, model in report["scores"].items():
        size, right, less = model["bits_per_byte"], model["masked_token_accuracy"], model["minus_first_student"]
        print(f"{name:{width}}  {interval(size)}     {interval(less, '+'):28}  {right['value']:.3f}")
    minutes, gibibytes = report["seconds"] / 60, report["peak_process_bytes"] / 2**30
    print(f"\n{minutes:.1f} minutes in all stages, largest process {gibibytes:.2f} GiB")
    print(f"numbers: {run}/report.json   page: {run}/report/index.html   release: {run}/hf")


def interval(estimate: dict[str, float], sign: str = "") -> str:
    return f"{estimate['value']:{sign}.4f} [{estimate['low']:{sign}.4f}, {estimate['high']:{sign}.4f}]"


if __name__ == "__main__":
    cli.run(main)
