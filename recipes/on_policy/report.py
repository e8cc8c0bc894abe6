"""Print what the rollouts of on-policy rounds cost, and write it to on_policy.json.

    python recipes/on_policy/report.py runs/on_policy --rounds 4

Reads the stages' stamps (recipes/stage.py) and rollouts.json of each round.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_tide import cli
from megatron_tide.files import read_json, write_json
from megatron_tide.generate.rollouts import SUMMARY
from megatron_tide.report.run_folder import read_stages

PARTS = ("answer", "data", "cache", "train")
FORM = {"own": int, "corpus": int, "tokens": int, "finished": int, "empty": int, "as_written": int}


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the recipe's folder")
    parser.add_argument("--rounds", type=cli.number(int, 1, 1 << 20), required=True, help="number of rounds")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    rounds = [
        read_json(run / f"round-{number}-answers" / SUMMARY, "run the recipe again", FORM)
        for number in range(1, arguments.rounds + 1)
    ]
    stages, _ = read_stages(run)
    part_of = stages["name"].str.partition("-")[0]
    seconds = {part: float(stages["seconds"][part_of == part].sum()) for part in PARTS}
    spent = sum(seconds.values())
    share = seconds["answer"] / spent if spent else 0.0
    write_json(run / "on_policy.json", {"rounds": rounds, "seconds": seconds, "rollout_share": share})
    of_each = ", ".join(f"{part} {took:.0f} s" for part, took in seconds.items() if took)
    total = {name: sum(one[name] for one in rounds) for name in FORM}
    cli.say(
        f"rollouts: {share:.0%} of the rounds' time ({of_each}); {total['own']:,} answers of {total['tokens']:,} "
        f"tokens ({total['finished']:,} ended, {total['empty']:,} empty and dropped; the text of "
        f"{total['as_written']:,} makes as many tokens again), {total['corpus']:,} rows of the corpus"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
