"""Write one self-contained page about a run, or several beside each other: curves, scores, memory, speed, samples.

    python tools/report.py runs/quickstart                     # -> runs/quickstart/report/index.html
    python tools/report.py runs/mine runs/other --out page     # compared

RUN is a recipe's folder (runs/NAME) or the folder of one training run (with metrics.jsonl). The page names whatever a
folder lacks, with the command that writes it. Nothing is measured or downloaded: scores come from tools/evaluate.py,
completions from tools/generate.py, memory and speed from python -m megatron_tide inference-benchmark.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_tide import cli


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a recipe or of a training run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for index.html [report in the first RUN]")
    args = parser.parse_args(argv)
    from megatron_tide.report.page import build_page, check_out, write_page
    from megatron_tide.report.run_folder import read_runs, visible

    out = args.out or args.runs[0] / "report"
    check_out(out)
    page = build_page(read_runs(args.runs))
    sections, figures = page.count("<section "), page.count("<figure ")
    print(f"{visible(write_page(out, page))}: {sections} sections, {figures} figures")
    return 0


if __name__ == "__main__":
    cli.run(main)
