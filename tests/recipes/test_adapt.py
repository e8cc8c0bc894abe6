"""The road from an autoregressive model to a block diffusion student, whole and tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.models import load_model
from tests.recipes.test_recipes import commands, run
from tests.support.ar_models import UNUSED, ar_folder
from tests.support.chain import conversations
from tests.support.tokenizers import TEXTS

RECIPE = "adapt_ar_to_bd3lm.sh"


def test_settings_reach_the_stages() -> None:
    stages = commands(RECIPE, "--max-steps", "7", SOURCE="a/b", BLOCK="8", MASK_TOKEN="<M>", BLOCK_GROWTH="4:0.5")
    assert list(stages) == ["student", "data", "train-adaptation", "convert", "report"]
    made, trained = " ".join(stages["student"]), " ".join(stages["train-adaptation"])
    assert "init-model --from a/b --block-size 8 --mask-token <M> --out" in made
    assert "--student-block" not in stages["data"]  # the folder of the stage before states it
    assert "--block-size" not in commands(RECIPE)["student"]  # and SOURCE what that one is made of
    for flags in (
        "--strategy bd3lm",
        "--pretraining ar:0.05,joint:0.35",
        "--block-growth 4:0.5",
        "--timesteps block",
        "--max-steps 7",
    ):
        assert flags in trained
    assert "--pretraining" not in " ".join(commands(RECIPE, PRETRAINING="")["train-adaptation"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("shape", ["qwen3", "llama"])
def test_an_autoregressive_model_becomes_a_released_student(tmp_path: Path, shape: str) -> None:
    rows = conversations(32)
    texts = [message["content"] for row in rows for message in row["messages"]]
    source = ar_folder(tmp_path / "source", shape, TEXTS + texts)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"SOURCE": source, "DATA": tmp_path / "rows.jsonl", "MASK_TOKEN": UNUSED, "RUNS": tmp_path}
    settings |= {"BLOCK": 8, "BLOCK_GROWTH": "4:0.5", "PRETRAINING": "ar:0.25,joint:0.5", "STUDENT_LENGTH": 96}
    flags = ["--precision", "fp32", "--global-batch-size", "4", "--max-steps", "4", "--log-every", "1"]
    finished = run(RECIPE, *flags, timeout=1400, NPROC="1", **{name: str(value) for name, value in settings.items()})
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    folder = tmp_path / "adapt_ar_to_bd3lm"
    metrics = [json.loads(line) for line in (folder / "adaptation" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/phase"] for row in metrics] == [0, 1, 1, 2]
    assert [row["train/block_size"] for row in metrics] == [4, 4, 8, 8]
    student, tokenizer = load_model(folder / "hf"), load_tokenizer(folder / "hf")
    assert student.config.model_type == f"a2d-{shape}"
    assert (student.config.block_size, student.config.mask_token_id) == (8, tokenizer.mask_id)
    assert tokenizer.id_to_token(tokenizer.mask_id) == UNUSED
    assert json.loads((folder / "hf" / "parity.json").read_text())["largest_logit_difference"] == 0.0
    assert (folder / "report" / "index.html").is_file()
