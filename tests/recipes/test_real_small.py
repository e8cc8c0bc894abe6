"""Real weights on a small machine: the recipe's commands, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tide.models import read_config
from tests.recipes.test_recipes import commands, run
from tests.support.ar_models import UNUSED, ar_folder

RECIPE = "real_small.sh"
STUDENTS = ["bd3lm", "kl"]


def test_sizes_and_knobs_reach_the_stages() -> None:
    cpu, gpu = (
        commands(RECIPE, SIZE=size, STRATEGIES=" ".join(STUDENTS), ADAPT_FLAGS="--score-prompt")
        for size in ("cpu", "gpu")
    )
    assert [name for name in cpu if name.startswith(("train", "convert"))] == [
        "train-adaptation", "convert", "train-bd3lm", "train-kl", "convert-small"
    ]  # fmt: skip
    steps = [words["train-kl"][words["train-kl"].index("--max-steps") + 1] for words in (cpu, gpu)]
    assert int(steps[0]) < int(steps[1])
    assert "--score-prompt" in cpu["train-adaptation"]
    assert "--score-prompt" not in cpu["train-kl"]
    assert "kl=runs/real_small/hf_small" in cpu["scores"]
    assert commands(RECIPE, NOISE="")["train-kl"] == [
        word for word in commands(RECIPE, NOISE="--tidal-midrange")["train-kl"] if word != "--tidal-midrange"
    ]
    for refused, text in ((run(RECIPE, DRY_RUN="1", SIZE="tpu"), "SIZE=tpu"), (run(RECIPE, "--frsh"), "'--frsh'")):
        assert refused.returncode == 2
        assert text in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_and_tiny(tmp_path: Path) -> None:
    source = ar_folder(tmp_path / "source", "llama", num_hidden_layers=3)
    settings = {"SOURCE": source, "MASK_TOKEN": UNUSED, "RUNS": tmp_path, "STRATEGIES": " ".join(STUDENTS)}
    settings |= {
        "ADAPT_STEPS": 40,
        "LR": 1e-2,
        "DISTILL_STEPS": 2,
        "EVAL_SAMPLES": 4,
        "COMPLETIONS": 2,
        "STUDENT_LENGTH": 256,
    }
    finished = run(RECIPE, timeout=1400, NPROC="1", **{name: str(value) for name, value in settings.items()})
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    folder = tmp_path / "real_small"
    scores = json.loads((folder / "scores.json").read_text())
    assert [model["name"] for model in scores["models"]] == ["start", *STUDENTS, "adapted"]
    for name, layers in (("hf", 3), ("small", 2), ("hf_small", 2)):
        family, config = read_config(folder / name)
        assert (family.model_types[0], config.num_hidden_layers, config.block_size) == ("a2d-llama", layers, 4)
    assert (folder / "report" / "index.html").is_file()
