"""HumanEval: prompts, programs, pass@k, and what is kept on disk."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.evaluate import humaneval as module
from megatron_tide.evaluate.asking import Asking, cut, mean
from megatron_tide.evaluate.humaneval import humaneval, pass_at_k, program_of, read_problems
from megatron_tide.evaluate.presets import PAPER
from megatron_tide.sandbox import run_program
from tests.support.answering import Scripted
from tests.support.lab import Lab

PRESET = PAPER["humaneval"]


def knows(lab: Lab, right: float = 1.0) -> Scripted:
    """Answers with canonical solutions; with ``right`` below 1, only to that share of the problems."""
    problems = read_problems()

    def script(text: str) -> str:
        place = next(n for n, problem in enumerate(problems) if problem["prompt"] in text)
        good = (place * 7 % 10) / 10 < right
        return (problems[place]["canonical_solution"] if good else "    return None\n") + "```\nprint(undefined)"

    return Scripted(load_tokenizer(lab.student), script)


def asking(answerer: Scripted, folder: Path, **knobs: object) -> Asking:
    return Asking(answerer=answerer, folder=folder, **knobs)  # type: ignore[arg-type]


def test_prompts_are_those_of_humaneval_instruct(lab: Lab, tmp_path: Path) -> None:
    answerer = knows(lab)
    humaneval(asking(answerer, tmp_path, limit=1), PRESET)
    prompt = read_problems()[0]["prompt"]
    (asked,) = answerer.asked
    assert f"make sure that it passes the tests:\n```python\n{prompt}\n```" in asked
    assert asked.endswith(f"Here is the completed function:\n```python\n{prompt}\n")


def test_a_model_that_knows_some_answers_scores_that_share(lab: Lab, tmp_path: Path) -> None:
    (score,) = humaneval(asking(knows(lab, 0.5), tmp_path, limit=20), PRESET)
    assert (score.metric, score.n, score.estimate.value) == ("pass@1", 20, 0.5)
    assert 0.2 < score.estimate.low < 0.4 < 0.6 < score.estimate.high < 0.8
    verdicts = [json.loads(line) for line in next(tmp_path.glob("humaneval-verdicts-*")).read_text().splitlines()[1:]]
    assert sum(row["value"]["passed"] for row in verdicts) == 10
    assert all(row["value"]["reason"] for row in verdicts if not row["value"]["passed"])


def test_what_was_asked_and_run_before_is_not_asked_or_run_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = knows(lab, 0.5)
    whole = humaneval(asking(answerer, tmp_path, limit=12, batch_size=1), PRESET)
    assert len(answerer.asked) == 12
    monkeypatch.setattr(module, "run_programs", lambda *a, **k: pytest.fail("a program ran again"))
    assert humaneval(asking(answerer, tmp_path, limit=12, batch_size=1), PRESET) == whole
    assert len(answerer.asked) == 12
    assert humaneval(asking(answerer, tmp_path, limit=4, batch_size=1), PRESET)[0].n == 4
    monkeypatch.undo()
    humaneval(asking(answerer, tmp_path, limit=12, batch_size=1), replace(PRESET, new_tokens=99))
    assert len(answerer.asked) == 24


def test_several_samples_give_pass_at_k(lab: Lab, tmp_path: Path) -> None:
    """Ten samples of three problems, of which the first 0, 3 and 10 are right."""
    problems, right, count = read_problems()[:3], (0, 3, 10), [0, 0, 0]

    def script(text: str) -> str:
        place = next(n for n, problem in enumerate(problems) if problem["prompt"] in text)
        count[place] += 1
        return problems[place]["canonical_solution"] if count[place] <= right[place] else "    return None\n"

    answerer = Scripted(load_tokenizer(lab.student), script)
    drawn = replace(PRESET, temperature=0.8)
    scores = humaneval(asking(answerer, tmp_path, limit=3, samples_per_problem=10), drawn)
    assert [(score.metric, score.n) for score in scores] == [("pass@1", 3), ("pass@10", 3)]
    assert [score.estimate.value for score in scores] == pytest.approx([1.3 / 3, 2 / 3])


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int) -> None:
    """Against every way of drawing k of the samples, without replacement."""
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_programs_are_cut_and_wrong_ones_fail() -> None:
    problem = read_problems()[0]
    solution = problem["canonical_solution"]
    assert program_of(problem, f"{solution}```\nThat was it.")[0] == problem["prompt"] + solution
    assert run_program(program_of(problem, solution)).passed
    assert run_program(program_of(problem, "    return True\n")).reason.startswith("AssertionError")
    assert not run_program(program_of(problem, "    return True\ndef check(candidate): pass\n")).passed
    plain = program_of(problem, f"{solution}\ndef another():\n    nonsense", module.STOPS)
    assert plain[0] == problem["prompt"] + solution


def test_without_a_template_the_bare_prompt_is_asked(lab: Lab, tmp_path: Path) -> None:
    answerer = knows(lab)
    (score,) = humaneval(asking(answerer, tmp_path, limit=2), replace(PRESET, chat_template=False))
    assert answerer.asked == [problem["prompt"] for problem in read_problems()[:2]]
    assert score.n == 2


def test_cut_and_mean() -> None:
    assert cut("one two three", ["three", " two"]) == "one"
    assert cut("one", ["", "two"]) == "one"
    estimate = mean([True, False, True, True], seed=0)
    assert estimate.value == 0.75
    assert estimate.low < 0.75 < estimate.high <= 1.0


def test_mistakes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for knobs in ({"batch_size": 0}, {"samples_per_problem": 0}, {"limit": -1}, {"workers": -1}):
        with pytest.raises(ValueError, match="1 or more, a limit and workers 0 or more"):
            asking(knows(lab), tmp_path, **knobs)
    answerer = knows(lab)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval\.txt"):
        humaneval(asking(answerer, tmp_path), PRESET)


@pytest.mark.slow
def test_the_canonical_solutions_score_100_percent(lab: Lab, tmp_path: Path) -> None:
    answerer = knows(lab)
    (score,) = humaneval(asking(answerer, tmp_path), PRESET)
    assert (score.n, score.estimate.value) == (164, 1.0)
    assert (score.estimate.low, score.estimate.high) == (1.0, 1.0)
