"""Write the settings of the trial with the fewest held-out bits per byte, for `distill --config`.

    python recipes/study/choose.py tuning/NAME/round-1.json ... --out tuning/NAME/best-1.json

Reads the JSON of the evaluate command, in which each model is a training run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_tide import cli
from megatron_tide.config import read_config_file
from megatron_tide.evaluate.score_table import read_scores
from megatron_tide.files import refuse_unlike, write_json

TUNED = ("lr", "max_steps", "temperature", "distill_weight")


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="+", type=Path, help="JSON of the evaluate command")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args(argv)
    refuse_unlike(arguments.out, ("trials",))
    trials = [(path, model) for path in arguments.rounds for model in read_scores(path)["models"]]
    bits = {model["name"]: model["bits_per_byte"]["value"] for _, model in trials}
    scores, best = min(trials, key=lambda trial: bits[trial[1]["name"]])
    run = Path(best["path"]) / "run.json"
    try:
        flags = read_config_file(str(run))
    except ValueError as error:
        raise ValueError(f"{run}, which {scores} names: {error}") from None
    if missing := [name for name in TUNED if name not in flags]:
        raise ValueError(f"{run}: no {missing[0]}; run the recipe again")
    settings = {name: flags[name] for name in TUNED}
    write_json(arguments.out, {"config": settings, "best": best["name"], "trials": bits})
    chosen = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    cli.say(f"best of {len(bits)} trials: {best['name']} ({bits[best['name']]:.4f} bits per byte): {chosen}")
    return 0


if __name__ == "__main__":
    cli.run(main)
