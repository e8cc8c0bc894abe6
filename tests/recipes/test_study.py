"""The study: its commands and table of arms agree, and its verdicts follow from the scores of each seed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tide import cli, distill
from megatron_tide.__main__ import command, split_commands
from megatron_tide.evaluate import study
from recipes.study import choose, results
from tests.recipes.test_recipes import commands, run

RECIPE = "study.sh"
SEEDS = 4
HYPOTHESES = ("H1 better < same: lower on every seed", "H2 other < same: noise only", "H3 same < better: the reverse")


def calls(words: list[str]) -> list[list[str]]:
    """The commands of one stage."""
    return list(split_commands(words[words.index("megatron_tide") + 1 :])) if "megatron_tide" in words else []


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_every_command_is_understood_and_every_hypothesis_has_its_arms(size: str, tmp_path: Path) -> None:
    stages = commands(RECIPE, SIZE=size, RUNS=str(tmp_path))
    words = [one for line in stages.values() for one in line]
    chosen = {
        after for before, after in itertools.pairwise(words) if before == "--config" and after.startswith(str(tmp_path))
    }
    assert chosen
    for path in map(Path, chosen):  # what tuning writes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"config": {"lr": 0.004}}))
    assert chosen <= {words[at + 1] for at, one in enumerate(words) if one == "--out"}
    for line in stages.values():
        for name, *flags in calls(line):
            cli.parse(command(name), flags)
    parsed = results.parser().parse_args(stages["results"][2:])
    scored = calls(stages["seed-3"])[-1]
    start, *arms = cli.parse(command("evaluate"), scored[1:]).student
    assert start == f"start={tmp_path}/study_{size}/start-3"
    hypotheses = [study.Hypothesis.parse(text) for text in parsed.hypothesis]
    assert len({one.name for one in hypotheses}) == len(hypotheses)
    assert {one.lower for one in hypotheses} | {one.higher for one in hypotheses} == {Path(one).name for one in arms}
    assert len(parsed.scores) == 5


def test_arms_of_a_seed_share_start_and_noise_and_differ_by_their_flags(tmp_path: Path) -> None:
    stages = commands(RECIPE, RUNS=str(tmp_path))
    for path in {word for line in stages.values() for word in line if word.endswith("best-last.json")}:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"config": {"lr": 0.004, "temperature": 5.0}}))
    arms = {}
    for _, *flags in calls(stages["seed-2"])[:-1]:
        config = cli.parse(distill, flags).run
        arms[Path(config.paths.out).name] = config.loss_flags()
        assert (config.paths.student, config.train.seed) == (str(tmp_path / "study_cpu" / "start-2"), 2)
    ours = arms["tide-bridge"]
    assert (ours["lr"], ours["temperature"]) == (0.004, 5.0)
    differing = {name: {flag for flag in ours if ours[flag] != flags[flag]} for name, flags in arms.items()}
    assert differing == {
        "bd3lm": {"strategy", "tidal", "compdemo", "teacher_context"},
        "tide-cross": {"strategy", "tidal", "compdemo", "teacher_context"},
        "tide-shared": {"strategy", "tidal", "compdemo", "teacher_context"},
        "tide-bridge": set(),
        "full-context": {"teacher_context"},
        "expand": {"masking"},
        "one-timestep": {"timesteps"},
        "compdemo": {"compdemo"},
        "tidal": {"tidal"},
        "byte-prefix": {"distribution_rows"},
    }


def test_trials_of_chunk_likelihoods_share_the_answers_of_one_cache(tmp_path: Path) -> None:
    """Each trial trains from outputs of exactly its inputs: T and the weight are no part of them."""
    stages = commands(RECIPE, RUNS=str(tmp_path))
    for path in {word for line in stages.values() for word in line if word.endswith(".json") and "best-" in word}:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"config": {"lr": 0.004, "max_steps": 400}}))
    told = [one for stage, line in stages.items() if stage.startswith("tune") for one in calls(line)]
    caches = {one.paths.out: one for one in (cli.parse(command("cache"), f).run for n, *f in told if n == "cache")}
    trials = [cli.parse(distill, flags).run for name, *flags in told if name == "distill"]
    cached = [one for one in trials if one.teacher.teacher_hosting == "cached"]
    assert {one.strategy.strategy for one in cached} == {"tide-cross", "tide-shared"}
    assert len(cached) == 7 + 3
    for one in cached:
        asked, free = caches[one.teacher.teacher_cache].loss_flags(), ("lr", "temperature", "distill_weight")
        assert {name for name, value in one.loss_flags().items() if value != asked[name]} <= set(free)


def test_on_policy_rounds_are_a_comparison_of_their_own_that_can_be_added_later(tmp_path: Path) -> None:
    before, stages = commands(RECIPE, RUNS=str(tmp_path)), commands(RECIPE, RUNS=str(tmp_path), H9="1")
    added = [f"on-policy-{seed}" for seed in range(1, 6)] + ["results-on-policy"]
    assert list(stages) == [*before, *added]
    assert {name: words for name, words in stages.items() if name in before} == before
    best = tmp_path / "study_cpu" / "tuning" / "tide-bridge" / "best-last.json"
    best.parent.mkdir(parents=True)
    best.write_text(json.dumps({"config": {"lr": 0.004, "max_steps": 400}}))
    every = calls(stages["on-policy-3"])
    told = [(name, cli.parse(command(name), flags)) for name, *flags in every]
    assert [name for name, _ in told] == [*["rollout", "prepare", "distill"] * 8, "evaluate"]
    answered, trained = ([one for name, one in told if name == which] for which in ("rollout", "distill"))
    assert [one.share for one in answered] == [0.5] * 4 + [0.0] * 4
    assert [one.round for one in answered] == [1, 2, 3, 4] * 2
    flags = [one.run.loss_flags() for one in trained]
    assert all(one == flags[0] for one in flags)
    assert [one.run.save.until_step for one in trained] == [100, 200, 300, 400] * 2
    outs = [one.run.paths.out for one in trained]
    assert [one.run.save.continue_from for one in trained] == ["", *outs[:3], "", *outs[4:7]]
    assert [one.model for one in answered[1:4]] == outs[:3]
    last = [f"{name}={outs[place]}" for name, place in (("on-policy", 3), ("off-policy", 7))]
    assert list(told[-1][1].student[1:]) == last
    (text,) = results.parser().parse_args(stages["results-on-policy"][2:]).hypothesis
    assert (study.Hypothesis.parse(text).lower, study.Hypothesis.parse(text).higher) == ("on-policy", "off-policy")


def test_a_dry_run_says_how_long_it_takes() -> None:
    last = run(RECIPE, DRY_RUN="1").stdout.splitlines()[-1]
    assert last.startswith("# expected on 2 cores: ")
    assert int(last.split()[-2]) <= 155
    assert "expected" not in run(RECIPE, DRY_RUN="1", SIZE="gpu").stdout


@pytest.mark.parametrize(
    ("settings", "text"), [({"SIZE": "tpu"}, "SIZE=tpu: use cpu or gpu"), ({"SEEDS": "1"}, 'SEEDS="1": intervals')]
)
def test_mistakes_are_refused(settings: dict[str, str], text: str) -> None:
    refused = run(RECIPE, DRY_RUN="1", **settings)
    assert refused.returncode == 2
    assert text in refused.stderr


def scored(name: str, bits: float, **more: Any) -> dict[str, Any]:
    """One of the models in the JSON of the evaluate command."""
    estimates = {
        n: {"value": v, "low": v, "high": v} for n, v in (("bits_per_byte", bits), ("masked_token_accuracy", 0.1))
    }
    return {"name": name, "path": name, "side": "student", **estimates, **more}


def scores(folder: Path, **changes: Any) -> list[str]:
    """scores.json of each seed: 60 samples of 50 bytes, better 5 nats lower on all of them."""
    paths = []
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        common = generator.normal(100.0, 20.0, 60)
        nats = {
            name: common + generator.normal(0.0, 1.0, 60) for name in ("start", "same", "other", "better", "teacher")
        }
        nats["better"] -= 5.0
        models = [scored(n, 2.0, per_sample={"nats": v.tolist(), "bytes": [50.0] * 60}) for n, v in nats.items()]
        content = {"models": models, "data": {"fingerprint": "x"}, "settings": {"samples": 60}} | changes
        changes = {}
        paths.append(folder / f"{seed}.json")
        paths[-1].write_text(json.dumps(content))
    return [str(path) for path in paths]


def judge(folder: Path, paths: list[str], hypotheses: tuple[str, ...] = HYPOTHESES) -> None:
    flags = [f"--hypothesis={text}" for text in hypotheses]
    results.main([*paths, *flags, "--tuning", str(folder / "tuning"), "--size", "cpu", "--out", str(folder / "out")])


def test_verdicts_table_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = tmp_path / "tuning" / "better" / "best-last.json"
    best.parent.mkdir(parents=True)
    best.write_text(
        json.dumps({"config": {"lr": 0.004}, "best": "lr-4e-3", "trials": {"lr-4e-3": 2.5, "lr-8e-3": 2.6}})
    )
    judge(tmp_path, scores(tmp_path))
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    rows = found["hypotheses"]
    assert [row["verdict"] for row in rows] == [study.HOLDS, study.OPEN, study.FAILS]
    assert rows[0]["difference"]["value"] == pytest.approx(-5.0 / 50 / np.log(2.0), abs=0.01)
    assert rows[0]["difference"]["high"] < 0 < rows[2]["difference"]["low"]
    assert [row["p_holm"] for row in rows] == study.holm([row["p"] for row in rows])
    assert len(rows[0]["by_seed"]) == SEEDS
    assert found["models"]["start"]["minus_start"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["tuning"]["better"]["trials"] == {"lr-4e-3": 2.5, "lr-8e-3": 2.6}
    nats = {name: np.array(rows) for name, rows in found["per_sample"]["nats"].items()}
    again = study.effect(nats["better"] - nats["same"], np.array(found["per_sample"]["bytes"]))
    assert again.to_dict() == {name: rows[0][name] for name in again.to_dict()}
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "better &lt; same" in page
    assert "http" not in page
    printed = capsys.readouterr().out
    assert "does not hold" in printed
    assert "lr 0.004" in printed


def test_seeds_on_other_data_and_unknown_arms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluate all seeds alike"):
        judge(tmp_path, scores(tmp_path, data={"fingerprint": "y"}))
    with pytest.raises(ValueError, match="evaluate with --per-sample"):
        judge(tmp_path, scores(tmp_path, models=[scored("same", 2.0)]))
    with pytest.raises(ValueError, match="hypothesis H9: no scores of 'best'"):
        judge(tmp_path, scores(tmp_path), ("H9 best < same: there is none",))


def test_the_best_trial_of_all_rounds_is_chosen(tmp_path: Path) -> None:
    rounds = []
    for number, trials in enumerate(({"a": 2.5, "b": 2.3}, {"c": 2.4})):
        models = []
        for name, bits in trials.items():
            (tmp_path / name).mkdir()
            flags = {
                "train": {"lr": bits / 1000, "max_steps": 40},
                "strategy": {"temperature": 5.0, "distill_weight": 1.0},
            }
            (tmp_path / name / "run.json").write_text(json.dumps({"config": flags}))
            models.append(scored(name, bits, path=str(tmp_path / name)))
        rounds.append(tmp_path / f"round-{number}.json")
        rounds[-1].write_text(json.dumps({"models": models, "data": {"fingerprint": "x"}, "settings": {"samples": 60}}))
    out = tmp_path / "best.json"
    choose.main([*map(str, rounds), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["config"] == {"lr": 0.0023, "max_steps": 40, "temperature": 5.0, "distill_weight": 1.0}
    assert (found["best"], len(found["trials"])) == ("b", 3)
    rest = ["--student", "s", "--teacher", "t", "--bridge", "b", "--data", "d", "--out", "o"]
    assert cli.parse(distill, ["--config", str(out), *rest]).run.train.lr == 0.0023
    (tmp_path / "b/run.json").unlink()
    with pytest.raises(ValueError, match=r"b/run\.json, which .*round-0\.json names: .*no such file"):
        choose.main([*map(str, rounds), "--out", str(out)])
