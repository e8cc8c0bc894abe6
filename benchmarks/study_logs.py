"""What the study's logs say beside its results: teacher's mass by how the student spells it, and the cost of rollouts.

    python -m benchmarks.study_logs runs/study_cpu --json benchmarks/results/study_logs.json

Reads a finished study (``H9=1 bash recipes/study.sh``). Of every seed: ``spelled``, the mean over the training of arm
byte-prefix of the teacher's mass on tokens that the student spells in one token, and in several; ``rollouts``, answers,
their tokens and seconds, and seconds of training steps, over all rounds of arm on-policy. A seed with a round whose
rollouts were interrupted has no such row, because a round knows only the seconds of its last start.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import report
from megatron_tide import cli
from megatron_tide.files import read_json
from megatron_tide.generate.rollouts import SUMMARY
from megatron_tide.report.run_folder import METRICS, read_run

ROUND = {"own": int, "tokens": int, "now": {"tokens": int, "seconds": float}}
SOURCES = {
    "spelled": f"spelled/*_mass of seed-N/byte-prefix/{METRICS}",
    "rollouts": f"seed-N/on-policy/round-*-answers/{SUMMARY}, time/step_s of seed-N/on-policy/round-*/{METRICS}",
}


def curve(run: Path, name: str) -> pd.Series:
    """One number of a training run over its steps; ValueError where it was not logged."""
    found = read_run(run, run.name).trainings[0].curve(name)
    if found.empty:
        raise ValueError(f"{run}: no {name} in {METRICS}; bash recipes/study.sh writes it")
    return found


def spelled(seed: Path) -> dict[str, float]:
    masses = {name: curve(seed / "byte-prefix", f"spelled/{name}_mass") for name in ("one_token", "several_tokens")}
    return {name: round(float(mass.mean()), 4) for name, mass in masses.items()}


def rollouts(seed: Path) -> dict[str, Any]:
    """Empty where a round was interrupted, and where the study has no on-policy rounds."""
    folder = seed / "on-policy"
    numbers = range(1, 1 + len(list(folder.glob("round-*-answers"))))
    rounds = [read_json(folder / f"round-{number}-answers" / SUMMARY, form=ROUND) for number in numbers]
    if not rounds or any(one["now"]["tokens"] != one["tokens"] for one in rounds):
        return {}
    steps = pd.concat([curve(folder / f"round-{number}", "time/step_s") for number in numbers])
    since_the_line_before = steps.index.to_series().diff().fillna(steps.index[0])
    training = float((steps * since_the_line_before).sum())
    seconds = sum(one["now"]["seconds"] for one in rounds)
    return {
        **{name: sum(one[key] for one in rounds) for name, key in (("answers", "own"), ("tokens", "tokens"))},
        "rollout_seconds": round(seconds, 2),
        "training_seconds": round(training, 2),
        "rollout_share": round(seconds / (seconds + training), 4),
    }


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the recipe's folder, runs/NAME")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    seeds = {path.name.removeprefix("seed-"): path for path in sorted(arguments.study.glob("seed-*"))}
    if not seeds:
        raise ValueError(f"{arguments.study}: no seed-* in it; give the folder of recipes/study.sh, runs/NAME")
    found = {
        "spelled": {name: spelled(path) for name, path in seeds.items()},
        "rollouts": {name: figures for name, path in seeds.items() if (figures := rollouts(path))},
    }
    report("study_logs", {name: {"from": SOURCES[name], "seeds": rows} for name, rows in found.items()}, arguments.json)


if __name__ == "__main__":
    cli.run(main)
