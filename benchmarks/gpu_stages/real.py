"""Stage k: recipes/real_small.sh on real weights up to its scores, with as many steps as the time that is left should
allow.

The weights are SmolLM2-135M-Instruct as one .gguf file, or as parts of one, in order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_stages.bench import Bench
from megatron_tide.files import read_json

ROOT = Path(__file__).parents[2]
# Assumed; of the time that is left, for the adaptation and for all three distillations.
STEPS_A_SECOND, SHARE = 6.0, 0.35
# Without its picture and its page, whose libraries a GPU machine may lack.
STAGES = "source corpus data train convert-bd3lm small convert-small scores"


def run(bench: Bench) -> None:
    if not bench.real_weights and not bench.tiny:
        bench.note(skipped="no --real-weights")
        return
    source = bench.folder / "weights.gguf"
    with source.open("wb") as whole:
        for part in bench.real_weights.split(os.pathsep) if bench.real_weights else ():
            with Path(part).open("rb") as file:
                shutil.copyfileobj(file, whole)
    steps = 20 if bench.tiny else max(20, int(bench.left * SHARE * STEPS_A_SECOND))
    settings = {"SIZE": "gpu", "SOURCE": str(source), "RUNS": str(bench.folder), "PYTHON": sys.executable}
    settings |= {
        "ONLY": STAGES,
        "ADAPT_STEPS": str(steps),
        "DISTILL_STEPS": str(steps // 3),
        "EVAL_SAMPLES": "100",
        "COMPLETIONS": "20",
        "ADAPTATIONS": "bd3lm",
        "SEEDS": "42",
    }
    if bench.tiny:
        settings["DRY_RUN"] = "1"
    done = subprocess.run(
        ["bash", "recipes/real_small.sh"],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    commands = [line[2:] for line in done.stdout.splitlines() if line.startswith("# ") and ": skipped" not in line]
    bench.note(adaptation_steps=steps, commands=commands)
    if done.returncode:
        raise AssertionError(f"status {done.returncode}: {' | '.join(lines[-4:])}")
    if not bench.tiny:
        models = read_json(bench.folder / "real_small/scores-first.json")["models"]
        bench.note(bits_per_byte={model["name"]: model["bits_per_byte"] for model in models})
