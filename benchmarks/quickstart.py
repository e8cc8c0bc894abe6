"""What the quickstart shows, over several seeds and Python versions.

    python -m benchmarks.quickstart runs/quickstart runs/quickstart-1 --json benchmarks/results/quickstart.json

Reads the report.json of finished runs (``SEED=1 NAME=quickstart-1 bash recipes/quickstart.sh``): bits per byte of every
row, differences to denoising only and to the start with paired 95 % intervals over samples, and completions that parse
and say something; counts the runs in which tide-bridge is below each of them with its whole interval. ``--with FILE``
counts the runs of an earlier file of figures too, such as those of other machines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import report
from megatron_tide import cli
from megatron_tide.files import read_json

BASELINES = ("bd3lm", "bd3lm-short", "start")


def one_run(folder: Path) -> dict[str, Any]:
    """The figures of one finished quickstart."""
    found = read_json(folder / "report.json", "the quickstart writes it at its end")
    scores = found["scores"]
    return {
        "seed": found["seed"],
        "python": found["versions"]["python"],
        "minutes": found["seconds"] / 60,
        "peak_process_bytes": found["peak_process_bytes"],
        "cpu": found["machine"]["cpu"],
        "samples": scores["start"]["samples"],
        "bits_per_byte": {name: one["bits_per_byte"]["value"] for name, one in scores.items()},
        "minus": {name: {base: one["minus"][base] for base in BASELINES} for name, one in scores.items()},
        "parse_and_say_something": {name: one["completions"]["both"] for name, one in scores.items()},
        "completions": scores["start"]["completions"]["count"],
    }


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished quickstarts")
    parser.add_argument("--with", dest="earlier", type=Path, help="file of figures whose runs come first")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    earlier = read_json(arguments.earlier)["runs"] if arguments.earlier else []
    runs = earlier + [one_run(folder) for folder in arguments.runs]
    ours = [run["minus"]["tide-bridge"] for run in runs]
    holds = {f"tide-bridge below {base}, runs": sum(one[base]["high"] < 0 for one in ours) for base in BASELINES}
    more = [run["parse_and_say_something"] for run in runs]
    better = sum(one["tide-bridge"] > max(one["bd3lm"], one["bd3lm-short"]) for one in more)
    figures = {"number of runs": len(runs), **holds, "more completions than denoising only, runs": better, "runs": runs}
    report("quickstart", figures, arguments.json)


if __name__ == "__main__":
    cli.run(main)
