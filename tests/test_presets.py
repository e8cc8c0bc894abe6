"""``--preset paper`` is each pipeline's own published setting, below the flags of a file and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tide import cli, distill
from megatron_tide.config import DistillConfig, StrategyConfig, TrainConfig
from megatron_tide.files import read_json
from megatron_tide.objectives import build_strategy
from tests.objectives.test_table import MAPPED, SHARED

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIMISER = ("optimizer", "lr_schedule", "warmup_ratio", "lr", "epochs")
# (preset, strategy, shared tokenizer) -> chunk objective, distribution objective, what TIDAL does to each, CompDemo,
# midrange weight, T, samples per step.
TABLE: dict[tuple[str, str, bool], tuple[Any, ...]] = {
    ("paper", "tide-cross", False): ("reverse_calm", "none", "off", None, False, False, 2.0, 64),
    ("paper", "tide-shared", False): ("calm", "none", "mix", None, True, False, 2.0, 64),
    ("paper", "calm", False): ("calm", "none", "off", None, False, False, 2.0, 64),
    ("paper-script", "tide-cross", False): ("reverse_calm", "none", "off", None, False, False, 5.0, 64),
    ("paper", "tide-cross", True): ("none", "reverse_kl", None, "off", False, False, 2.0, 80),
    ("paper", "tide-shared", True): ("none", "forward_kl", None, "mix", True, True, 2.0, 80),
    ("paper", "kl", True): ("none", "forward_kl", None, "off", False, False, 2.0, 80),
    ("paper-script", "tide-shared", True): ("none", "forward_kl", None, "mix", True, True, 2.0, 80),
}


def run_of(folder: Path, shared: bool, *flags: str) -> DistillConfig:
    (folder / "manifest.json").write_text(json.dumps({"manifest": {"shared": shared}, "sha256": ""}))
    return cli.parse(distill, ["--bridge", str(folder), *flags]).run


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_paper_is_the_table(tmp_path: Path, row: tuple[str, str, bool]) -> None:
    preset, name, shared = row
    config = run_of(tmp_path, shared, "--preset", preset, "--strategy", name)
    built = build_strategy(config.strategy, SHARED if shared else MAPPED).describe()
    found = [built["chunk_objective"], built["distribution_objective"], built.get("chunk_tidal")]
    found += [built.get("distribution_tidal"), built["compdemo"], built["tidal_midrange"], built["temperature"]]
    assert (*found, config.train.global_batch_size) == TABLE[row]
    assert {key: getattr(config.train, key) for key in OPTIMISER} == dict(
        zip(OPTIMISER, ("adamw", "cosine", 0.1, 5e-5, 10.0))
    )
    curve = ("tidal_init", "tidal_peak", "tidal_ramp", "tidal_axes", "distill_weight")
    assert [getattr(config.strategy, key) for key in curve] == [0.1, 0.9, "cosine", "both", 1.0]
    for ranks in (1, 2, 4, 8, 16):
        assert config.train.global_batch_size % (config.train.micro_batch_size * ranks) == 0


def test_paper_is_the_default_and_without_a_bridge_it_changes_nothing(tmp_path: Path) -> None:
    plain = cli.parse(distill, ["--strategy", "tide-shared"]).run
    assert (plain.strategy, plain.train) == (StrategyConfig(strategy="tide-shared"), TrainConfig())
    assert cli.parse(distill, ["--bridge", str(tmp_path / "none")]).run.strategy == StrategyConfig()
    assert run_of(tmp_path, True, "--strategy", "tide-shared").strategy.tidal_midrange


def test_a_file_and_the_command_line_come_first(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"strategy": "tide-shared", "global_batch_size": 32, "bridge": str(tmp_path)}))
    (tmp_path / "manifest.json").write_text(json.dumps({"manifest": {"shared": True}}))
    run = cli.parse(distill, ["--config", str(file), "--no-tidal-midrange"]).run
    assert (run.train.global_batch_size, run.strategy.tidal_midrange) == (32, False)
    assert cli.parse(distill, ["--config", str(file)]).run.strategy.tidal_midrange
    assert cli.parse(distill, ["--config", str(file), "--preset", "ours"]).run.strategy.tidal == "off"
    file.write_text(json.dumps({"config": DistillConfig().to_dict()}))  # states everything
    with pytest.raises(
        ValueError, match=r"--preset ours changes nothing: --config .*run\.json states all of its flags"
    ):
        cli.parse(distill, ["--config", str(file), "--preset", "ours"])
    cli.parse(distill, ["--config", str(file), "--preset", "paper"])


@pytest.mark.parametrize(("batch", "micro_batch"), [(64, 4), (160, 5), (8, 4)])
def test_another_batch_is_not_cut_as_the_published_one(tmp_path: Path, batch: int, micro_batch: int) -> None:
    """As in on_policy.sh with a teacher of the student's tokenizer."""
    train = run_of(tmp_path, True, "--global-batch-size", str(batch)).train
    assert (train.global_batch_size, train.micro_batch_size) == (batch, micro_batch)
    assert run_of(tmp_path, True, "--global-batch-size", "64", "--micro-batch-size", "8").train.micro_batch_size == 8


def test_ours_is_what_won_the_study_in_every_pipeline(tmp_path: Path) -> None:
    study = read_json(REPOSITORY / "benchmarks" / "results" / "study.json")
    verdicts = {one["name"]: (one["difference"]["value"] < 0, one["verdict"]) for one in study["hypotheses"]}
    assert verdicts["H4"] == (True, "holds")
    assert verdicts["H7a"] == verdicts["H7b"] == (False, "does not hold")
    for shared in (True, False):
        run = run_of(tmp_path, shared, "--preset", "ours", "--strategy", "tide-bridge")
        teaching = [getattr(run.strategy, name) for name in ("teacher_context", "compdemo", "tidal", "tidal_midrange")]
        assert teaching == ["staircase", False, "off", False]
        noise = [getattr(run.strategy, name) for name in ("masking", "timesteps", "timestep_sampling", "mask_count")]
        assert noise == ["synchronous", "block", "stratified", "exact"]
        assert run.train.global_batch_size == 64
    built = build_strategy(run.strategy, MAPPED).describe()
    assert (built["compdemo"], built["distribution_tidal"], built["chunk_tidal"]) == (False, "off", "off")
    assert run_of(tmp_path, False, "--preset", "ours", "--compdemo").strategy.compdemo


def test_trust_comes_from_the_command_line_alone(tmp_path: Path) -> None:
    """A run.json of someone else's, with --config, must not run what comes with the models that it names."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": {"paths": {"trust_remote_code": True, "teacher": "someone/model"}}}))
    with pytest.raises(ValueError, match="add --trust-remote-code if you trust"):
        cli.parse(distill, ["--config", str(file)])
    for word, trusted in (("--trust-remote-code", True), ("--no-trust-remote-code", False)):
        assert cli.parse(distill, ["--config", str(file), word]).run.paths.trust_remote_code is trusted


@pytest.mark.parametrize(("name", "value"), [("strategy", "../x"), ("tidal_init", 2.0**31), ("precision", "")])
def test_a_bad_value_of_a_file_is_told_with_the_file(tmp_path: Path, name: str, value: Any) -> None:
    file = tmp_path / "flags.json"
    file.write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"flags\.json: --{name.replace('_', '-')} "):
        cli.parse(distill, ["--config", str(file)])
