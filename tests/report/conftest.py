"""A tiny recipe's folder: two real training runs, scores, completions, an inference benchmark, stamps of stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.chain import Chain
from tests.support.commands import command
from tests.support.ranks import run_on_ranks
from tests.support.runs import train_and_tell
from tests.support.shared import made_once

TIDAL = {"strategy": "tide-bridge", "tidal_ramp": "linear", "temperature": 5.0}


@pytest.fixture(scope="session")
def recipe(chain, inference, tmp_path_factory) -> Path:
    """Treat it as read-only."""
    return made_once(tmp_path_factory, "tiny", lambda folder: make_recipe(chain, inference, folder))


def make_recipe(chain: Chain, inference: Path, folder: Path) -> Path:
    held_out = {"validation": str(chain.root / "data"), "eval_every": 4, "eval_samples": 5}
    for name, flags in {"baseline": {"strategy": "bd3lm"}, "bridged": {**TIDAL, **held_out}}.items():
        run_on_ranks(train_and_tell, 1, chain.run(folder / name, max_steps=8, **flags), timeout=200)
    student, teacher, data = (str(chain.root / name) for name in ("student", "teacher", "data"))
    models = [
        "--student",
        f"start={student}",
        "--student",
        str(folder / "baseline"),
        "--student",
        str(folder / "bridged"),
    ]
    scored = ["--data", data, *models, "--teacher", teacher, "--samples", "6", "--mc-samples", "2"]
    scored += ["--baseline", "start", "--baseline", "baseline", "--completions", "4", "--completion-tokens", "8"]
    command("evaluate")([*scored, "--json", str(folder / "scores.json")])
    prompts = ["--prompt", "Add <b>two</b> & three.", "--prompt", "Count.", "--max-new-tokens", "6"]
    command("generate")([student, *prompts, "--json", str(folder / "completions.jsonl")])
    shutil.copy(inference, folder / "inference_benchmark.json")
    (folder / ".stages").mkdir()
    for number, name in enumerate(("sample", "bridge", "a-first")):
        stamp = {"command": [name], "finished": 10.0 - number, "seconds": 60.0 * number, "peak_process_bytes": 2**30}
        (folder / ".stages" / f"{name}.json").write_text(json.dumps(stamp))
    return folder


@pytest.fixture
def own_copy(recipe, tmp_path) -> Path:
    """The same folder, to be changed."""
    return Path(shutil.copytree(recipe, tmp_path / "tiny"))
