"""Write one self-contained HTML page about a run, or about several runs side by side.

The page shows curves, scores, memory, speed and samples. RUN is a recipe's folder (runs/NAME) or the folder of one
training run (with metrics.jsonl). The page lists what is missing in a folder, with the command that writes it. Nothing
is measured or downloaded: scores come from the evaluate command, completions from generate, memory and speed from
inference-benchmark.

Examples:
  python -m megatron_tide report runs/quickstart                     # writes runs/quickstart/report/index.html
  python -m megatron_tide report runs/mine runs/other --out page     # compares two
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    runs: tuple[Path, ...] = flag(..., "Folder of a recipe or of a training run", metavar="RUN", kind="positional")
    out: Path | None = flag(None, "Folder to write index.html to", metavar="DIR", shown="report in the first RUN")


def run(args: Args) -> None:
    from megatron_tide.report.page import build_page, check_out, write_page
    from megatron_tide.report.run_folder import read_runs

    out = args.out or args.runs[0] / "report"
    if args.out is None and out.is_symlink():  # a run's own files do not say where a page is written
        raise ValueError(f"{out}: a link; remove it, or give its folder as --out")
    check_out(out)
    page = build_page(read_runs(args.runs))
    sections, figures = page.count("<section "), page.count("<figure ")
    say(f"{write_page(out, page)}: {sections} sections, {figures} figures")
