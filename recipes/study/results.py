"""Verdicts of the study's hypotheses: study.json, study.png and a page, from the scores of each seed.

    python recipes/study/results.py runs/study_cpu/seed-*/scores.json --tuning runs/study_cpu/tuning --size cpu \\
        --hypothesis "H1 tide-cross < bd3lm: TIDE-Cross against denoising only" --out runs/study_cpu/results

Reads the JSON that `evaluate --per-sample` wrote for each seed, all on the same samples. study.json has every number
that the verdicts are made from.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import megatron_tide.report
from megatron_tide import cli
from megatron_tide.evaluate import study
from megatron_tide.evaluate.bootstrap import Estimate, Floats
from megatron_tide.evaluate.score_table import read_scores, text_table
from megatron_tide.files import atomic_write, read_json
from megatron_tide.machine import machine, versions
from megatron_tide.report.style import COLOURS, MUTED, new_figure, png, styled

START, TEACHER = "start", "teacher"
COLOUR = {study.HOLDS: COLOURS[2], study.FAILS: COLOURS[1], study.OPEN: MUTED}
METHOD = (
    "Differences in held-out bits per byte (negative: the first named is better), with 95 % intervals over training "
    "seeds and test samples (crossed bootstrap, Student's t), and two-sided p corrected for all hypotheses (Holm). A "
    "hypothesis holds, or does not, where the corrected p is below 0.05; the sign of the difference decides which."
)


def read_seeds(paths: list[Path]) -> tuple[dict[str, Floats], Floats, dict[str, Any]]:
    """{model: nats [seeds, samples]}, bytes [samples], and on what they were measured.

    Raises:
        ValueError: seeds that differ in models, data or settings.
    """
    nats: dict[str, list[list[float]]] = {}
    first: dict[str, Any] = {}
    for path in paths:
        scores = read_scores(path)
        models = {model["name"]: model for model in scores["models"]}
        sizes = {tuple(model.get("per_sample", {}).get("bytes", ())) for model in models.values()}
        if sizes in (set(), {()}):
            raise ValueError(f"{path}: no numbers of single samples; evaluate with --per-sample")
        found = {"models": list(models), "data": scores["data"]["fingerprint"], "settings": scores["settings"]}
        found["bytes"] = [list(one) for one in sizes]
        first = first or found
        if found != first or len(sizes) > 1:
            raise ValueError(f"{path}: other models, data or settings than {paths[0]}; evaluate all seeds alike")
        if lengths := {len(one["per_sample"]["nats"]) for one in models.values()} - {len(found["bytes"][0])}:
            raise ValueError(f"{path}: {min(lengths)} nats for {len(found['bytes'][0])} samples; run the recipe again")
        for name, model in models.items():
            nats.setdefault(name, []).append(model["per_sample"]["nats"])
    about = {name: first[name] for name in ("data", "settings")}
    return {name: np.array(rows) for name, rows in nats.items()}, np.array(first["bytes"][0]), about


def judged(hypotheses: list[study.Hypothesis], nats: dict[str, Floats], bytes_N: Floats) -> list[dict[str, Any]]:
    """One row per hypothesis.

    Raises:
        ValueError: a hypothesis about a model without scores.
    """
    rows = []
    for one in hypotheses:
        if unknown := {one.lower, one.higher} - set(nats):
            raise ValueError(f"hypothesis {one.name}: no scores of {min(unknown)!r}; there are {', '.join(nats)}")
        found = study.effect(nats[one.lower] - nats[one.higher], bytes_N)
        rows.append(
            {"name": one.name, "lower": one.lower, "higher": one.higher, "meaning": one.meaning, **found.to_dict()}
        )
    for row, corrected in zip(rows, study.holm([row["p"] for row in rows])):
        row |= {"p_holm": corrected, "verdict": study.verdict(row["difference"]["value"], corrected)}
    return rows


def arms(nats: dict[str, Floats], bytes_N: Floats) -> dict[str, Any]:
    """Bits per byte of each model over all seeds, and less the start's; no hypothesis, so no p."""
    found = {}
    for name, nats_SN in nats.items():
        by_seed = (nats_SN.sum(1) / bytes_N.sum() / np.log(2.0)).tolist()
        found[name] = {"bits_per_byte": float(np.mean(by_seed)), "by_seed": by_seed}
        if START in nats:
            found[name]["minus_start"] = study.effect(nats_SN - nats[START], bytes_N).difference.to_dict()
    return found


def tuned(folder: Path) -> dict[str, Any]:
    """The settings that tuning chose for each strategy, and what every trial scored on the validation split."""
    form = {"config": {str: float}, "trials": dict}
    paths = sorted(folder.glob("*/best-last.json"))
    found = {path.parent.name: read_json(path, "run the recipe again", form) for path in paths}
    return {name: {"chosen": one["config"], "trials": one["trials"]} for name, one in found.items()}


def tables(result: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """What people read: the hypotheses, and the models."""
    verdicts = [
        {
            "": row["name"],
            "hypothesis": f"{row['lower']} < {row['higher']}",
            "difference": f"{Estimate(**row['difference']):+}",
            "p (Holm)": f"{row['p_holm']:.2g}" if row["p_holm"] >= 1e-6 else "< 1e-6",
            "verdict": row["verdict"],
            "what": row["meaning"],
        }
        for row in result["hypotheses"]
    ]
    models = [
        {
            "model": name,
            "bits per byte": f"{one['bits_per_byte']:.4f}",
            "minus start": f"{Estimate(**one['minus_start']):+}" if "minus_start" in one else "",
            "settings chosen": ", ".join(
                f"{key} {value:g}" for key, value in result["tuning"].get(name, {}).get("chosen", {}).items()
            ),
        }
        for name, one in result["models"].items()
    ]
    return {"Hypotheses": pd.DataFrame(verdicts), "Models": pd.DataFrame(models)}


@styled
def picture(result: dict[str, Any]) -> Figure:
    """Each hypothesis' difference with its interval and its seeds; each model less the start."""
    hypotheses = result["hypotheses"]
    models = {
        name: one for name, one in result["models"].items() if "minus_start" in one and name not in (START, TEACHER)
    }
    figure = new_figure(0.42 * max(len(hypotheses), len(models)) + 1.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for place, row in enumerate(reversed(hypotheses)):
        _interval(left, place, row["difference"], row["by_seed"], COLOUR[row["verdict"]])
    labels = [f"{row['name']}  {row['lower']} < {row['higher']}" for row in hypotheses[::-1]]
    left.set_yticks(range(len(hypotheses)), labels)
    for colour, verdict in ((colour, verdict) for verdict, colour in COLOUR.items()):
        left.plot([], [], color=colour, marker="D", label=verdict)
    left.legend(fontsize=8)
    left.set(title="difference, 95 %; points: seeds", xlabel="bits per byte (negative: as hypothesised)")
    start = result["models"].get(START, {}).get("by_seed", [])
    for place, one in enumerate(reversed(models.values())):
        _interval(right, place, one["minus_start"], [a - b for a, b in zip(one["by_seed"], start)], COLOURS[0])
    right.set_yticks(range(len(models)), list(models)[::-1])
    right.set(title="minus the common start", xlabel="bits per byte (lower is better)")
    for ax, rows in ((left, hypotheses), (right, models)):
        ax.set_ylim(-0.5, len(rows) - 0.4)
        ax.locator_params(axis="x", nbins=5)
        ax.axvline(0, color=MUTED, linewidth=1)
        ax.grid(axis="y", visible=False)
    return figure


def _interval(ax: Any, place: int, difference: dict[str, float], by_seed: list[float], colour: str) -> None:
    ax.hlines(place, difference["low"], difference["high"], colors=colour, linewidth=2)
    ax.scatter(difference["value"], place, 36, color=colour, marker="D", zorder=3)
    ax.scatter(by_seed, [place + 0.22] * len(by_seed), 9, color=colour, alpha=0.6)


def page(result: dict[str, Any], image: bytes) -> str:
    """A self-contained HTML file."""
    style = (Path(megatron_tide.report.__file__).parent / "style.css").read_text(encoding="utf-8")
    settings = (
        f"{result['size']}, {result['seeds']} seeds, {result['settings']['samples']} test samples, {result['date']}"
    )
    parts = [f"<h1>Study</h1><p class='muted'>{html.escape(settings)}</p><p>{html.escape(METHOD)}</p>"]
    parts += [f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(image).decode("ascii")}"></figure>']
    for title, frame in tables(result).items():
        parts.append(f"<h2>{title}</h2><div class='scroll'>{frame.to_html(index=False, border=0)}</div>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Study</title><style>{style}</style>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def to_json(result: dict[str, Any]) -> str:
    """Readable JSON with each list of numbers on one line."""
    text = json.dumps(result, indent=1, sort_keys=True)
    return re.sub(r"\[[-+.,\deE\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def parser() -> cli.Parser:
    found = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("scores", nargs="+", type=Path, help="scores.json of each seed")
    found.add_argument("--hypothesis", action="append", required=True, help="NAME LOWER < HIGHER: meaning; repeatable")
    found.add_argument("--tuning", type=Path, required=True, help="folder of what tuning chose")
    found.add_argument("--size", required=True, help="the recipe's size, for the record")
    found.add_argument("--out", type=Path, required=True, help="folder to write")
    return found


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    hypotheses = [study.Hypothesis.parse(text) for text in arguments.hypothesis]
    nats, bytes_N, about = read_seeds(arguments.scores)
    result = {
        **about,
        "hypotheses": judged(hypotheses, nats, bytes_N),
        "models": arms(nats, bytes_N),
        "tuning": tuned(arguments.tuning),
        "size": arguments.size,
        "seeds": len(arguments.scores),
        "versions": versions(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "per_sample": {"bytes": bytes_N.tolist(), "nats": {name: rows.tolist() for name, rows in nats.items()}},
    }
    image = png(picture(result))
    arguments.out.mkdir(parents=True, exist_ok=True)
    contents = {"study.json": to_json(result).encode(), "study.png": image, "index.html": page(result, image).encode()}
    for name, content in contents.items():
        atomic_write(arguments.out / name, content)
    for frame in tables(result).values():
        cli.say(text_table(list(frame.columns), frame.to_numpy().tolist()) + "\n")
    cli.say(f"numbers, picture and page: {arguments.out}/study.json, study.png, index.html")
    return 0


if __name__ == "__main__":
    cli.run(main)
