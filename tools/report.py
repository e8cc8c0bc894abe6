"""One self-contained page about a run, or about several beside each other: curves, scores, memory, speed, samples.

    python tools/report.py runs/quickstart                     # -> runs/quickstart/report/index.html and PNGs
    python tools/report.py runs/mine runs/other --out page     # compared

RUN is a recipe's folder (runs/NAME) or one training run's (with metrics.jsonl). What it does not hold is named in the
page, with the command that writes it. Nothing is measured or downloaded here: scores come from tools/evaluate.py,
completions from tools/generate.py, memory and speed from python -m megatron_tide.report.footprint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_tide import cli


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="recipe's folder or training run's folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page goes [report in the first RUN]")
    args = parser.parse_args(argv)
    from megatron_tide.report.page import check_out, write_page
    from megatron_tide.report.reading import read_runs
    from megatron_tide.report.sections import build_page

    out = args.out or args.runs[0] / "report"
    check_out(out)
    page = build_page(read_runs(args.runs))
    print(f"{write_page(out, page)}: {len(page.sections)} sections, {len(page.pictures)} pictures")
    return 0


if __name__ == "__main__":
    cli.run(main)
