"""On-policy rounds: the recipe's commands, and two of its rounds, whole and tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tide.__main__ import main
from megatron_tide.config import TrainConfig
from megatron_tide.train.schedule import learning_rate
from recipes.on_policy import report
from tests.recipes.test_recipes import commands, run
from tests.support.chain import Chain
from tests.support.launch import run_command
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve

RECIPE = "on_policy.sh"
LR = 1e-3
FLAGS = ["--precision", "fp32", "--teacher-dtype", "fp32", "--log-every", "1", "--lr", str(LR), "--skip-teacher-probe"]


def test_settings_reach_the_stages_and_rounds_go_on() -> None:
    settings = {
        "ROUNDS": "2",
        "STEPS": "7",
        "BATCH": "8",
        "ON_POLICY": "0.25",
        "DECODING": "--threshold 0.9",
        "MASKS": "order",
        "CACHE": "1",
    }
    stages = commands(RECIPE, "--lr", "1e-5", STUDENT="a/b", NPROC="2", STUDENT_BLOCK="8", **settings)
    rounds = [f"{stage}-{number}" for number in (1, 2) for stage in ("answer", "data", "cache", "train-round")]
    assert list(stages) == ["sample", "bridge", *rounds, "convert", "report"]
    lines = {name: " ".join(words) for name, words in stages.items()}
    assert "rollout a/b --data" in lines["answer-1"]
    assert "rollout runs/on_policy/round-1 --data" in lines["answer-2"]
    for flags in (
        "--round 2 --samples 56 --share 0.25",
        "--block-size 8",
        "--threshold 0.9",
        "--nproc-per-node 2",
        "--as-written",
    ):
        assert flags in lines["answer-2"]
    assert "--data runs/on_policy/round-2-answers/mixture.json" in lines["data-2"]
    for stage in ("cache-2", "train-round-2"):
        assert "--max-steps 14 --until-step 14" in lines[stage]
        assert "--continue-from runs/on_policy/round-1 " in lines[stage]
        assert lines[stage].endswith("--own-masks order --timesteps block --lr 1e-5")
    assert "--continue-from" not in lines["train-round-1"]
    assert "--teacher-cache runs/on_policy/cache-2" in lines["train-round-2"]
    assert "convert runs/on_policy/round-2 " in lines["convert"]
    plain = commands(RECIPE, ROUNDS="1")
    assert not any("cache" in name for name in plain)
    assert "--own-masks" not in plain["train-round-1"]
    for setting, line in (("ROUNDS=0", "ROUNDS=0 STEPS=100: use whole numbers"), ("MASKS=all", "use random or order")):
        refused = run(RECIPE, DRY_RUN="1", **dict([setting.split("=")]))
        assert (refused.returncode, line in refused.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_two_rounds_whole_and_tiny(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "ROUNDS": 2,
        "STEPS": 2,
        "BATCH": 4,
        "STUDENT": chain.root / "student",
        "TEACHER": chain.root / "teacher",
    }
    settings |= {
        "DATA": chain.root / "corpus.jsonl",
        "STUDENT_LENGTH": 96,
        "TEACHER_LENGTH": 96,
        "RUNS": tmp_path,
        "MASKS": "order",
        "STRATEGY": "tide-bridge",
        "CACHE": 1,
    }
    stages = commands(
        RECIPE,
        *FLAGS,
        "--distribution-rows",
        "byte_prefix",
        NPROC="1",
        **{name: str(value) for name, value in settings.items()},
    )
    words = [words[words.index("-m") + 1 :] for words in stages.values()]
    every = [[one[0].removeprefix("megatron_tide.").removeprefix("megatron_tide"), *one[1:]] for one in words]
    joined = [word for one in every for word in (*filter(None, one), "--then")][:-1]
    finished = run_command(main, joined, tmp_path)
    assert finished.status == 0, finished.printed[-3000:]
    folder = tmp_path / "on_policy"
    manifests = [json.loads((folder / f"round-{number}-data" / "manifest.json").read_text()) for number in (1, 2)]
    assert [one["own"] for one in manifests] == [[[0, 3]], [[0, 3]]]
    assert [one["ordered"] for one in manifests] == [True, True]
    records = [json.loads((folder / f"round-{number}" / "run.json").read_text())["strategy"] for number in (1, 2)]
    assert [one["own_masks"] for one in records] == ["order", "order"]
    assert [one["distribution_rows"] for one in records] == ["byte_prefix", "byte_prefix"]
    assert [one["counts"]["read"] for one in manifests] == [8, 8]
    assert len({one["fingerprint"] for one in manifests}) == 2
    curves = [read_curve(folder / f"round-{number}") for number in (1, 2)]
    assert [curve["step"] for curve in curves] == [[1, 2], [3, 4]]
    rates = [learning_rate(step, 4, LR, TrainConfig()) for step in range(4)]
    assert [rate for curve in curves for rate in curve["train/lr"]] == pytest.approx(rates)
    assert "continuing from" in finished.printed
    assert (folder / "hf" / "model.safetensors").is_file()
    # On two ranks the second round's texts are the same.
    answer = [word.replace("round-2-answers", "again") for word in every[list(stages).index("answer-2")] if word]
    assert run_on_ranks(main, 2, answer, timeout=280) == [0, 0]
    for name in ("answers.jsonl", "own.jsonl", "corpus.jsonl", "mixture.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "round-2-answers" / name).read_bytes()
    stamps = folder / ".stages"
    stamps.mkdir()
    for name, seconds in (("answer-1", 3), ("answer-2", 1), ("data-2", 2), ("train-round-1", 4), ("report", 5)):
        stamp = {"seconds": seconds, "peak_process_bytes": 1, "finished": 1}
        (stamps / f"{name}.json").write_text(json.dumps(stamp))
    report.main([str(folder), "--rounds", "2"])
    assert (
        "rollouts: 40% of the rounds' time (answer 4 s, data 2 s, train 4 s); 8 answers of" in capsys.readouterr().out
    )
    assert json.loads((folder / "on_policy.json").read_text())["rollout_share"] == 0.4
