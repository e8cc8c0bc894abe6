"""Print the quickstart's scores, time and memory, and write them to report.json.

    python recipes/quickstart/report.py runs/quickstart --seed 42

Reads scores.json (evaluate command) and the stages' stamps (recipes/stage.py).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_tide import cli
from megatron_tide.evaluate.score_table import read_scores, score_cells, score_table, text_table
from megatron_tide.files import write_json
from megatron_tide.machine import machine, versions
from megatron_tide.report.run_folder import read_stages


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the recipe's folder")
    parser.add_argument("--seed", type=cli.number(int, 0, 2**31), required=True, help="the recipe's, for the record")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    scores = read_scores(run / "scores.json", {"completions": {"prompts": [str]}})
    stages, corrupt = read_stages(run)
    if corrupt:
        raise ValueError(f"{corrupt[0]}; run the recipe again")
    report = {
        "scores": {model["name"]: model for model in scores["models"]},
        "evaluation": {"data": scores["data"], **scores["settings"]},
        "prompts": scores["completions"]["prompts"],
        "stages": stages.set_index("name").to_dict("index"),
        "seconds": float(stages["seconds"].sum()),
        "peak_process_bytes": int(stages["peak_process_bytes"].max()),
        "seed": arguments.seed,
        "versions": versions(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(run / "report.json", report)
    minutes, gibibytes = report["seconds"] / 60, report["peak_process_bytes"] / 2**30
    print(
        f"\nheld-out text, {scores['settings']['samples']} test samples, 95 % intervals, the same masks for every model"
    )
    cli.say(text_table(*score_table([score_cells(model) for model in scores["models"]])))
    print(f"\n{minutes:.1f} minutes in all stages, largest process {gibibytes:.2f} GiB")
    cli.say(f"numbers: {run}/report.json   page: {run}/report/index.html   release: {run}/hf")
    return 0


if __name__ == "__main__":
    cli.run(main)
