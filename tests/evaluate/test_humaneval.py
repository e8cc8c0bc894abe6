"""HumanEval: prompts, programs, pass@k, and what is kept on disk."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tide.evaluate import harness
from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset, changed_preset
from megatron_tide.evaluate.benchmark_table import benchmark_table
from megatron_tide.evaluate.harness import EvalContext, MetricScore, pass_at_k, run_benchmark
from megatron_tide.evaluate.task_functions import humaneval_problems, humaneval_program
from megatron_tide.sandbox import Outcome, run_program
from tests.support.answering import Scripted
from tests.support.lab import Lab

PRESET = changed_preset("humaneval", "paper", {})
PROBLEMS = list(humaneval_problems()["test"])


def knows(lab: Lab, right: float = 1.0) -> Scripted:
    """Answers with canonical solutions; with ``right`` below 1, only to that share of the problems."""

    def script(text: str) -> str:
        place = next(n for n, problem in enumerate(PROBLEMS) if problem["prompt"] in text)
        good = (place * 7 % 10) / 10 < right
        return (PROBLEMS[place]["canonical_solution"] if good else "    return None\n") + "```\nprint(undefined)"

    return Scripted(lab.student, script)


def humaneval(generator: Scripted, folder: Path, preset: BenchmarkPreset = PRESET, **more: Any) -> list[MetricScore]:
    context = EvalContext(name="m", path="p", generator=generator, folder=folder, **more)
    return run_benchmark("humaneval", preset, context).scores


def test_prompts_are_those_of_humaneval_instruct(lab: Lab, tmp_path: Path) -> None:
    generator = knows(lab)
    humaneval(generator, tmp_path, limit=1)
    prompt = PROBLEMS[0]["prompt"]
    (asked,) = generator.asked
    assert f"make sure that it passes the tests:\n```python\n{prompt}\n```" in asked
    assert asked.endswith(f"Here is the completed function:\n```python\n{prompt}\n")


def test_a_model_that_knows_some_answers_scores_that_share(lab: Lab, tmp_path: Path) -> None:
    (score,) = humaneval(knows(lab, 0.5), tmp_path, limit=20)
    assert (score.metric, score.n, score.estimate.value) == ("pass@1", 20, 0.5)
    assert 0.2 < score.estimate.low < 0.4 < 0.6 < score.estimate.high < 0.8
    rows = [json.loads(line) for line in next(tmp_path.glob("humaneval_instruct*")).read_text().splitlines()[1:]]
    verdicts = [verdict for row in rows for verdict in row["verdicts"]]
    assert sum(verdict["passed"] for verdict in verdicts) == 10
    assert all(verdict["reason"] for verdict in verdicts if not verdict["passed"])


def test_what_was_asked_and_run_before_is_not_asked_or_run_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = knows(lab, 0.5)
    whole = humaneval(generator, tmp_path, limit=12)
    assert len(generator.asked) == 12
    monkeypatch.setattr(harness, "run_programs", lambda *a, **k: pytest.fail("a program ran again"))
    assert humaneval(generator, tmp_path, limit=12) == whole
    assert len(generator.asked) == 12
    assert humaneval(generator, tmp_path, limit=4)[0].n == 4
    monkeypatch.undo()
    humaneval(generator, tmp_path, replace(PRESET, new_tokens=99), limit=12)
    assert len(generator.asked) == 24


def test_programs_run_again_where_other_packages_are_installed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, run, ran = knows(lab), harness.run_programs, []
    monkeypatch.setattr(
        harness, "run_programs", lambda programs, *a, **k: ran.extend(programs) or run(programs, *a, **k)
    )
    for installed in ([], [], ["numpy"]):
        found = [SimpleNamespace(name=name, version="2.0") for name in installed]
        monkeypatch.setattr("importlib.metadata.distributions", lambda found=found: found)
        humaneval(generator, tmp_path, limit=1)
    assert len(ran) == 2
    assert len(generator.asked) == 1


def test_judging_stopped_in_the_middle_continues(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the programs that run at once are lost."""
    monkeypatch.setattr(harness, "PROGRAMS_AT_ONCE", 2)
    run, ran = harness.run_programs, []

    def stops(programs: list[list[str]], *rest: Any, **more: Any) -> Any:
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.extend(programs)
        return run(programs, *rest, **more)

    monkeypatch.setattr(harness, "run_programs", stops)
    with pytest.raises(KeyboardInterrupt):
        humaneval(knows(lab), tmp_path, limit=7)
    monkeypatch.setattr(
        harness, "run_programs", lambda programs, *a, **k: ran.extend(programs) or run(programs, *a, **k)
    )
    (score,) = humaneval(knows(lab), tmp_path, limit=7)
    assert (score.n, score.estimate.value, len(ran)) == (7, 1.0, 7)


def test_several_samples_give_pass_at_k(lab: Lab, tmp_path: Path) -> None:
    """Ten samples of three problems, of which the first 0, 3 and 10 are right."""
    problems, right, count = PROBLEMS[:3], (0, 3, 10), [0, 0, 0]

    def script(text: str) -> str:
        place = next(n for n, problem in enumerate(problems) if problem["prompt"] in text)
        count[place] += 1
        return problems[place]["canonical_solution"] if count[place] <= right[place] else "    return None\n"

    drawn = replace(PRESET, temperature=0.8)
    scores = humaneval(Scripted(lab.student, script), tmp_path, drawn, limit=3, samples_per_problem=10)
    assert [(score.metric, score.n) for score in scores] == [("pass@1", 3), ("pass@10", 3)]
    assert [score.estimate.value for score in scores] == pytest.approx([1.3 / 3, 2 / 3])
    assert count == [10, 10, 10]


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int) -> None:
    """Against every way of drawing k of the samples, without replacement."""
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_solution_may_import_what_is_installed(lab: Lab, tmp_path: Path) -> None:
    def script(text: str) -> str:
        right = PROBLEMS[0]["canonical_solution"]
        return f"    import numpy\n{right}" if PROBLEMS[0]["prompt"] in text else f"    import no_such_package\n{right}"

    context = EvalContext(name="m", path="p", generator=Scripted(lab.student, script), folder=tmp_path, limit=2)
    result = run_benchmark("humaneval", PRESET, context)
    assert result.scores[0].estimate.value == 0.5
    assert result.notes == ["programs failed because they import what is not installed: no_such_package (1)"]
    assert result.notes[0] in benchmark_table([result])


def run(problem: dict[str, str], answer: str) -> Outcome:
    return run_program(humaneval_program(problem, answer), tested=[problem["entry_point"]])


def test_wrong_programs_fail() -> None:
    problem = PROBLEMS[0]
    solution = problem["canonical_solution"]
    assert humaneval_program(problem, solution)[0] == problem["prompt"] + solution
    assert run(problem, solution).passed
    assert run(problem, "    return True\n").reason.startswith("AssertionError")
    assert not run(problem, "    return True\ndef check(candidate): pass\n").passed
    poly = PROBLEMS[32]  # its tests use poly, of its prompt
    assert run(poly, poly["canonical_solution"]).passed
    assert not run(poly, "    return 0\ndef poly(xs, x): return 0\n").passed


def test_without_a_template_the_bare_prompt_is_asked(lab: Lab, tmp_path: Path) -> None:
    """An answer then ends where a new top-level statement begins."""
    right = knows(lab)
    generator = Scripted(
        lab.student, lambda text: right.script(text).split("```")[0] + "\ndef another():\n    nonsense"
    )
    (score,) = humaneval(generator, tmp_path, changed_preset("humaneval", "paper", {"chat_template": False}), limit=2)
    assert generator.asked == [problem["prompt"] for problem in PROBLEMS[:2]]
    assert (score.n, score.estimate.value) == (2, 1.0)


@pytest.mark.slow
def test_the_canonical_solutions_score_100_percent(lab: Lab, tmp_path: Path) -> None:
    (score,) = humaneval(knows(lab), tmp_path)
    assert (score.n, score.estimate.value) == (164, 1.0)
    assert (score.estimate.low, score.estimate.high) == (1.0, 1.0)
