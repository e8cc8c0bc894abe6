"""What recipes/real_small.sh found: scores.json, report.json and a picture.

    python recipes/real_small/results.py runs/real_small/scores-first.json runs/real_small/scores-seeds.json \\
        --data runs/real_small/test-data --writer adapted-bd3lm --out runs/real_small

Reads what `evaluate --per-sample` wrote: all models, and the students of the further seeds, named NAME-seed-SEED.
scores.json is the first file, with a column for the difference to denoising only over all seeds. The picture shows all
rows, and one completion of --writer as its blocks resolve: the first that parses, says something, has no line twice and
is written alone as it was in its batch, if there is one (in bf16 a batch changes the last digits).
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_tide import cli
from megatron_tide.evaluate import study
from megatron_tide.evaluate.score_table import read_scores, score_cells, score_table, text_table
from megatron_tide.files import atomic_write, write_json
from megatron_tide.machine import machine, versions
from megatron_tide.report.run_folder import read_stages
from megatron_tide.report.style import COLOURS, INK, MUTED, new_figure, png, styled
from megatron_tide.screen import printable

BASELINE = "bd3lm"
FORM = {"completions": {"prompts": [str]}}
SHOWN = (0.12, 0.37, 0.7, 1.0)  # which of the passes of a completion are drawn, as shares
COLUMNS, LINES = 68, 12  # of the drawn text
SIZE = 8  # of its font, in points
OPEN = "\N{LIGHT SHADE}" * 3  # a position that is not decided yet
ORDER = {"decided before": INK, "in this block": COLOURS[1], "open": MUTED}


def over_seeds(models: dict[str, Any], repeated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{student: its difference to denoising only in bits per byte, over seeds and samples}; {} with one seed.

    Raises:
        ValueError: the two files were not measured on the same samples, or lack the samples' numbers.
    """
    seeds = sorted({name.rpartition("-seed-")[2] for name in repeated})
    found = {}
    for name in sorted({name.rpartition("-seed-")[0] for name in repeated} - {BASELINE}):
        rows = []
        for ending in ("", *(f"-seed-{seed}" for seed in seeds)):
            pair = [(repeated if ending else models).get(f"{one}{ending}", {}) for one in (name, BASELINE)]
            sizes = [one.get("per_sample", {}).get("bytes") for one in pair]
            if not sizes[0] or any(size != models[BASELINE]["per_sample"]["bytes"] for size in sizes):
                raise ValueError(f"{name}{ending}: no scores on the samples of {BASELINE}; run the recipe again")
            nats = [np.array(one["per_sample"]["nats"]) for one in pair]
            if any(len(one) != len(sizes[0]) for one in nats):
                raise ValueError(f"{name}{ending}: corrupt scores; run the recipe again")
            rows.append(nats[0] - nats[1])
        found[name] = study.effect(np.stack(rows), np.array(sizes[0])).to_dict() | {"seeds": len(rows)}
    return found


def merged(paths: list[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scores.json, the effects over seeds)."""
    scores = read_scores(paths[0], FORM)
    models = {model["name"]: model for model in scores["models"]}
    repeated: dict[str, Any] = {}
    for path in paths[1:]:
        more = read_scores(path)
        repeated |= {model["name"]: model for model in more["models"]}
        if more["data"]["fingerprint"] != scores["data"]["fingerprint"]:
            raise ValueError(f"{path}: scored on other data than {paths[0]}; run the recipe again")
    effects = over_seeds(models, repeated)
    for name, one in effects.items():
        models[name].setdefault("minus", {})[f"{BASELINE}, {one['seeds']} seeds"] = one["difference"]
    for model in models.values():
        model.pop("per_sample", None)
    return scores, effects


def writing(scores: dict[str, Any], writer: str, data: Path) -> list[dict[str, Any]]:
    """The states of one completion of ``writer`` after the passes ``SHOWN``: pieces of text, each with its key of
    ``ORDER``; the last state is the whole completion.
    """
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.data import PreparedData
    from megatron_tide.generate import from_prepared, stream
    from megatron_tide.models import DTYPES
    from megatron_tide.training_checkpoint import open_model

    (model,) = (one for one in scores["models"] if one["name"] == writer)
    texts = model["completions"]["texts"]
    fine = [one["parses"] and one["says_something"] and _varied(one["text"]) for one in texts]
    good = [place for place, one in enumerate(fine) if one]
    opened = open_model(model["path"], DTYPES[scores["settings"]["dtype"]])
    tokenizer = load_tokenizer(opened.folder)
    prompts = from_prepared(PreparedData.open(data), tokenizer, len(texts), "student")
    for place in [*good, *(good[:1] or [0])]:  # at worst the first of them, as it is written alone
        prompt = prompts[place]
        moments = list(stream(opened.model, tokenizer, prompt.ids, **scores["settings"]["decoding"]))
        if "".join(moment.new_text for moment in moments).strip() == texts[place]["text"].strip():
            break
    states, block = [], opened.model.config.block_size
    for share in SHOWN:
        passes = max(1, round(share * len(moments)))
        moment = moments[passes - 1]
        first = len(moment.ids) - (0 if share == 1.0 else block)  # of the block that is being decided
        pieces = []
        for place, (token, decided) in enumerate(zip(moment.ids, moment.decided)):
            kind = "open" if not decided else "in this block" if place >= first else "decided before"
            pieces.append([tokenizer.decode([token]) if decided else OPEN, kind])
        states.append({"passes": passes, "pieces": pieces})
    return [{"of": len(moments), "prompt": prompt.shown.strip()}, *states]


def _varied(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == len(set(lines))


def laid_out(pieces: list[list[str]]) -> list[tuple[int, int, str, str]]:
    """(line, column, text, kind) of ``pieces``, cut to ``COLUMNS`` and ``LINES``."""
    found, line, column = [], 0, 0
    for text, kind in pieces:
        for place, part in enumerate(re.split("\n", text.replace("\t", "    "))):
            line, column = (line + 1, 0) if place else (line, column)
            if part and line < LINES and column < COLUMNS:
                found.append((line, column, printable(part)[: COLUMNS - column], kind))
            column += len(part)
    return found


@styled
def picture(models: list[dict[str, Any]], states: list[dict[str, Any]]) -> Figure:
    """Left: bits per byte of each model; right: one completion, a panel for each of its ``states``."""
    texts = [laid_out(state["pieces"]) for state in states]
    heights = [1 + max((line for line, *_ in text), default=0) for text in texts]
    figure = new_figure(max(0.36 * len(models) + 1.1, 0.15 * (sum(heights) + 2 * len(heights))))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    ax, places = left.subplots(), range(len(models))[::-1]
    for place, model in zip(places, models):
        bits, colour = model["bits_per_byte"], COLOURS[0 if model["side"] == "student" else 1]
        ax.hlines(place, bits["low"], bits["high"], colors=colour, linewidth=2)
        ax.scatter(bits["value"], place, 36, color=colour)
    ax.set_yticks(list(places), [printable(model["name"]) for model in models])
    ax.set(title="held-out bits per byte, 95 %", xlabel="lower is better", ylim=(-0.6, len(models) - 0.4))
    for ax, text, height, state in zip(right.subplots(len(states), 1, height_ratios=heights), texts, heights, states):
        ax.set_title(f"after {state['passes']} forward passes", fontsize=8)
        ax.set(xlim=(0, COLUMNS), ylim=(height, 0))
        ax.axis("off")
        for line, column, part, kind in text:
            style = {"family": "DejaVu Sans Mono", "size": SIZE, "color": ORDER[kind], "va": "baseline"}
            ax.text(0, line + 0.6, " " * column + part, **style)  # spaces are as wide as the font draws them
    return figure


def main(argv: list[str]) -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", type=Path, help="of all models; then of the further seeds")
    parser.add_argument("--data", type=Path, required=True, help="the prepared data that they were scored on")
    parser.add_argument("--writer", required=True, help="the model whose completion is drawn")
    parser.add_argument("--out", type=Path, required=True, help="the recipe's folder")
    arguments = parser.parse_args(argv)
    run: Path = arguments.out
    scores, effects = merged(arguments.scores)
    about, *states = writing(scores, arguments.writer, arguments.data)
    write_json(run / "scores.json", scores)
    atomic_write(run / "picture.png", png(picture(scores["models"], states)))
    stages, corrupt = read_stages(run)
    if corrupt:
        raise ValueError(f"{corrupt[0]}; run the recipe again")
    report = {
        "scores": {model["name"]: model for model in scores["models"]},
        "over_seeds": effects,
        "drawn": {"writer": arguments.writer, **about},
        "evaluation": {"data": scores["data"], **scores["settings"]},
        "prompts": scores["completions"]["prompts"],
        "stages": stages.set_index("name").to_dict("index"),
        "versions": versions(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(run / "report.json", report)
    cli.say(text_table(*score_table([score_cells(model) for model in scores["models"]])))
    cli.say(f"\nnumbers: {run}/report.json   picture: {run}/picture.png   page: {run}/report/index.html")
    return 0


if __name__ == "__main__":
    cli.run(main)
