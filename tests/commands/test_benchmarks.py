"""The evaluate command with benchmarks: students, checkpoints and the autoregressive baseline by one command."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from megatron_tide.evaluate.benchmark_presets import published_row
from megatron_tide.evaluate.generators import BlockDiffusionGenerator
from tests.support.answering import write_autoregressive
from tests.support.commands import command
from tests.support.lab import Lab, write_checkpoint
from tests.support.launch import REPOSITORY, wait_until
from tests.support.lm_data import write_task

evaluate = command("evaluate")
SHORT = ["--max-new-tokens", "8", "--batch-size", "2"]


@pytest.fixture(scope="module")
def baseline(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoregressive(tmp_path_factory.mktemp("ar") / "ar", lab.student)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "gsm8k", count=40)
    write_task(folder, "mbpp", count=4)
    return folder


def answers_in(file: Path) -> dict[str, list[str]]:
    """Key of each sample -> its answers."""
    return {row["key"]: row["answers"] for row in map(json.loads, file.read_text().splitlines()) if "key" in row}


def test_one_table_for_every_kind_of_model(
    lab: Lab, baseline: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    models = [f"start={lab.student}", f"moved={tmp_path / 'run'}", f"ar={baseline}", f"teacher={lab.teacher}"]
    flags = ["--tasks", "humaneval", "gsm8k", "mbpp", "--limit", "2", "--include-path", str(tasks)]
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    evaluate([*models, *flags, *SHORT, "--out", str(out), "--json", str(scores)])
    found = json.loads(scores.read_text())["benchmarks"]
    assert [(one["model"], one["benchmark"]) for one in found] == [
        (model, task) for model in ("start", "moved", "ar", "teacher") for task in ("humaneval", "gsm8k", "mbpp")
    ]
    assert all(score["n"] == 2 for one in found for score in one["scores"])
    assert found[0]["scores"][0]["published"] == published_row("humaneval")
    decoders = [one["settings"]["decoder"] for one in found[::3]]
    assert decoders == ["block diffusion", "block diffusion", "autoregressive", "block diffusion"]
    assert len({one["settings"]["model"] for one in found}) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["model", "benchmark", "metric", "ours"]
    (row,) = (line for line in lines if line.startswith("ar ") and "humaneval" in line)
    assert row.split()[-4:] == [
        f"{published_row('humaneval')[name]:.2f}" for name in ("AR 0.6B", "BD3LM", "A: Cross", "B: Shared")
    ]
    assert any("not the paper's settings: new_tokens 8, steps 8" in line for line in lines)
    assert all(one["settings"]["max_new_tokens"] == 8 for one in found)
    answers = {name: answers_in(next((out / name).glob("gsm8k_cot-*"))) for name in ("start", "moved", "ar")}
    assert all(len(rows) == 2 for rows in answers.values())
    assert answers["start"] != answers["ar"]


def test_several_samples_of_each_problem(lab: Lab, tmp_path: Path) -> None:
    """Drawn with a seed of their own each; another seed is another file."""
    flags = ["--tasks", "humaneval", "--limit", "2", "--samples-per-problem", "10", "--temperature", "1", *SHORT]
    scores = tmp_path / "scores.json"
    for seed in ("3", "3", "4"):
        evaluate([f"s={lab.student}", *flags, "--seed", seed, "--out", str(tmp_path), "--json", str(scores)])
    (one,) = json.loads(scores.read_text())["benchmarks"]
    assert [score["metric"] for score in one["scores"]] == ["pass@1", "pass@10"]
    files = (tmp_path / "s").glob("humaneval_instruct_sandboxed-*")
    first, second = ([text for many in answers_in(file).values() for text in many] for file in files)
    assert len(first) == len(second) == 20
    assert len(set(first)) > 15
    assert first != second


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_results(
    lab: Lab, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--tasks",
        "gsm8k",
        "--include-path",
        str(tasks),
        "--max-new-tokens",
        "16",
        "--batch-size",
        "1",
        "--limit",
        "24",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def command(out: Path) -> list[str]:
        return [f"s={lab.student}", *flags, "--out", str(out), "--json", str(out.with_suffix(".json"))]

    def answered() -> int:
        return sum(map(cached, killed.glob("s/cache-*.sqlite")))

    process = subprocess.Popen([sys.executable, "tools/evaluate.py", *command(killed)], cwd=REPOSITORY, env=os.environ)
    wait_until(lambda: answered() > 0, [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answered()
    assert 0 < before < 24
    generated: list[int] = []
    complete = BlockDiffusionGenerator._complete
    monkeypatch.setattr(
        BlockDiffusionGenerator, "_complete", lambda self, *given: generated.append(1) or complete(self, *given)
    )
    evaluate(command(killed))
    assert len(generated) == 24 - before  # batches of one: no answer is generated twice but the one under way
    evaluate(command(whole))
    (file,) = killed.glob("s/gsm8k_cot-*")
    assert file.read_bytes() == (whole / "s" / file.name).read_bytes()
    results = [json.loads(out.with_suffix(".json").read_text())["benchmarks"][0] for out in (killed, whole)]
    assert results[0]["scores"] == results[1]["scores"]
    assert results[0]["scores"][0]["n"] == 24


def cached(file: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            return int(database.execute("select count(*) from unnamed").fetchone()[0])
    except sqlite3.OperationalError:  # its table comes a moment later
        return 0


def test_results_are_kept_beside_the_models_folder(lab: Lab, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    evaluate([str(step.parent), "--tasks", "humaneval", "--limit", "1", *SHORT])
    kept = step.parent.with_name(f"{step.parent.name}-evaluation")
    assert len(list(kept.glob("humaneval_instruct_sandboxed-*.jsonl"))) == 1
    assert len(list(kept.glob("cache-*.sqlite"))) == 1
