"""Real weights on a small machine: the recipe's commands, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tide.__main__ import main
from megatron_tide.evaluate import study
from megatron_tide.models import read_config
from recipes.real_small import results
from tests.recipes.test_recipes import commands, run
from tests.support.ar_models import UNUSED, ar_folder

RECIPE = "real_small.sh"
STUDENTS = ["bd3lm", "kl"]
NOWHERE = {"PYTHON": "not-installed"}  # a dry run then asks no interpreter for the number of GPUs, which takes time


def test_sizes_and_settings_reach_the_stages() -> None:
    cpu, gpu = (
        commands(
            RECIPE,
            SIZE=size,
            STRATEGIES=" ".join(STUDENTS),
            ADAPTATIONS="bd3lm kl",
            ADAPT_FLAGS="--score-prompt",
            SEEDS="1 2",
            **NOWHERE,
        )
        for size in ("cpu", "gpu")
    )
    assert [name for name in cpu if name.startswith(("train", "convert"))] == [
        "train-adapted-bd3lm", "convert-bd3lm", "train-adapted-kl", "convert-kl",
        "train-bd3lm", "train-kl", "convert-small", "train-bd3lm-seed-2", "train-kl-seed-2",
    ]  # fmt: skip
    steps = [words["train-kl"][words["train-kl"].index("--max-steps") + 1] for words in (cpu, gpu)]
    assert int(steps[0]) < int(steps[1])
    assert "--score-prompt" in cpu["train-adapted-bd3lm"]
    assert "--score-prompt" not in cpu["train-kl"]
    assert "causal" in cpu["train-adapted-kl"]
    assert not {"causal", "byte_prefix"} & {*cpu["train-adapted-bd3lm"], *cpu["train-bd3lm"]}
    assert "adapted-kl=runs/real_small/hf-kl" in cpu["scores"]
    assert "autoregressive=HuggingFaceTB/SmolLM2-135M-Instruct" in cpu["scores"]
    alike = [[word for word in cpu[f"train-kl{ending}"] if "kl" not in word] for ending in ("", "-seed-2")]
    assert [pair for pair in zip(*alike) if len({*pair}) > 1] == [("1", "2")]
    quiet, other = (commands(RECIPE, NOISE=noise, **NOWHERE)["train-kl"] for noise in ("", "--tidal-midrange"))
    assert quiet == [word for word in other if word != "--tidal-midrange"]


def test_one_model_and_one_seed_are_enough() -> None:
    stages = commands(
        RECIPE, ADAPTATIONS="kl", STRATEGIES="bd3lm", SEEDS="7", SOURCE="m.gguf", PRECISION="fp32", **NOWHERE
    )
    assert [name for name in stages if name.startswith(("train", "convert", "source"))] == [
        "source", "train-adapted-kl", "convert-kl", "train-bd3lm"
    ]  # fmt: skip
    assert "adapted-kl=runs/real_small/hf" in stages["scores"]
    assert "autoregressive=runs/real_small/source" in stages["scores"]
    assert "float32" in stages["scores"]
    assert "scores-seeds.json" not in " ".join(stages["scores"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"SIZE": "tpu"}, "SIZE=tpu"),
        ({"STRATEGIES": "kl bd3lm"}, "the first must be bd3lm"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, str], text: str) -> None:
    refused = run(RECIPE, DRY_RUN="1", **NOWHERE, **settings)
    assert refused.returncode == 2
    assert text in refused.stderr


def test_every_stage_has_its_expected_seconds_and_no_other() -> None:
    settings = {"SEEDS": "1 2", "SOURCE": "m.gguf", **NOWHERE}
    lines = run(RECIPE, DRY_RUN="1", **settings).stdout.splitlines()
    assert lines[-1].startswith("# expected on 2 cores: ")
    expected = [word.partition("=")[0] for word in lines[-1].partition("seconds: ")[2].split()]
    assert sorted(expected) == sorted(commands(RECIPE, **settings))
    assert run(RECIPE, "--frsh", **NOWHERE).returncode == 2


def scored(name: str, nats: list[float]) -> dict[str, Any]:
    one = {"value": sum(nats), "low": sum(nats) - 1.0, "high": sum(nats) + 1.0}
    row: dict[str, Any] = {"name": name, "side": "student", "path": name, "bits_per_byte": one}
    row |= {"masked_token_accuracy": one, "per_sample": {"nats": nats, "bytes": [10.0] * len(nats)}}
    return row


def scores_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    content = {"models": rows, "data": {"fingerprint": "d"}, "settings": {"samples": 4}, "completions": {"prompts": []}}
    path.write_text(json.dumps(content))
    return path


def test_the_interval_is_over_seeds_and_samples(tmp_path: Path) -> None:
    draws = np.random.default_rng(0).normal(5.0, 1.0, (2, 2, 40))  # [seed, model, sample]
    draws[:, 1] = draws[:, 0] - 1.0 + 0.1 * draws[:, 1]
    rows = [[scored(name, draws[s, m].tolist()) for m, name in enumerate(STUDENTS)] for s in range(2)]
    for row in rows[1]:
        row["name"] += "-seed-9"
    paths = [scores_file(tmp_path / f"{s}.json", [*rows[s]]) for s in range(2)]
    scores, effects = results.merged(paths)
    expected = study.effect(draws[:, 1] - draws[:, 0], np.full(40, 10.0)).to_dict()
    assert effects == {"kl": expected | {"seeds": 2}}
    assert expected["difference"]["high"] < 0.0
    assert scores["models"][1]["minus"] == {"bd3lm, 2 seeds": expected["difference"]}
    assert not any("per_sample" in model for model in scores["models"])
    assert results.merged(paths[:1])[1] == {}
    rows[1][0]["per_sample"]["bytes"][3] = 11.0
    with pytest.raises(ValueError, match="no scores on the samples of bd3lm"):
        results.merged([paths[0], scores_file(tmp_path / "other.json", rows[1])])


def test_a_completion_is_drawn_line_by_line() -> None:
    pieces = [["def", "decided before"], [" f():\n    ", "in this block"], [results.OPEN, "open"], ["x" * 99, "open"]]
    found = results.laid_out(pieces)
    assert found[:3] == [
        (0, 0, "def", "decided before"),
        (0, 3, " f():", "in this block"),
        (1, 0, "    ", "in this block"),
    ]
    assert (found[3][:2], found[4][:2]) == ((1, 4), (1, 7))
    assert len(found[4][2]) == results.COLUMNS - 7
    assert results.laid_out([["\n" * 99 + "x", "open"]]) == []
    states = [{"passes": 3, "pieces": pieces}] * 2
    assert results.png(results.picture([scored("a", [1.0]), scored("b", [2.0])], states)).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_stage_on_a_tiny_model(tmp_path: Path) -> None:
    """The recipe's commands, one after the other in this process; stages as such are those of test_stage.py."""
    folder, source = tmp_path / "real_small", ar_folder(tmp_path / "source", "llama", num_hidden_layers=3)
    settings = {
        "SOURCE": source,
        "MASK_TOKEN": UNUSED,
        "RUNS": tmp_path,
        "STRATEGIES": " ".join(STUDENTS),
        "ADAPTATIONS": "bd3lm kl",
    }
    settings |= {"ADAPT_STEPS": 20, "LR": 1e-2, "DISTILL_STEPS": 2, "EVAL_SAMPLES": 4, "MC_SAMPLES": 1}
    settings |= {"COMPLETIONS": 2, "STUDENT_LENGTH": 256, "SEEDS": "1 2", "PRECISION": "bf16", **NOWHERE}
    settings["ADAPT_FLAGS"] = "--skip-teacher-probe"  # the source has random weights
    for name, line in commands(RECIPE, **{key: str(value) for key, value in settings.items()}).items():
        if name == "results":
            assert results.main(line[2:]) == 0
        else:
            module = line.index("-m") + 1
            before = ["distill"] if line[module] == "megatron_tide.distill" else []
            assert main([*before, *line[module + 1 :]]) == 0, name
        for file in folder.glob("corpus/*.jsonl") if name == "corpus" else ():
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:96]))
    models = {model["name"]: model for model in json.loads((folder / "scores.json").read_text())["models"]}
    assert list(models) == ["small", "adapted-bd3lm", "adapted-kl", *STUDENTS, "autoregressive"]
    assert models["autoregressive"]["side"] == "teacher"
    assert all(model["completions"]["count"] == 2 for model in models.values())
    assert "bd3lm, 2 seeds" in models["kl"]["minus"]
    for name, layers in (("hf", 3), ("hf-kl", 3), ("small", 2), ("hf_small", 2)):
        family, config = read_config(folder / name)
        assert (family.model_types[0], config.num_hidden_layers, config.block_size) == ("a2d-llama", layers, 4)
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report" / "index.html").read_text()
    assert all(text in page for text in ("autoregressive (", "minus bd3lm, 2 seeds", "code\nfence"))
