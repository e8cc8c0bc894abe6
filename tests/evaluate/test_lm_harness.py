"""lm-eval's tasks asked of our models, on local data in the public sets' format."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.evaluate.asking import Asking, Score
from megatron_tide.evaluate.lm_harness import lm_task
from megatron_tide.evaluate.lm_tasks import mbpp
from megatron_tide.evaluate.presets import PAPER, Preset
from tests.support.answering import Scripted
from tests.support.lab import Lab
from tests.support.lm_data import LOCAL, Row, write_task


def knows(lab: Lab, name: str, rows: list[Row], share: int = 1) -> Scripted:
    """Answers every ``share``-th row rightly, the others with a wrong word."""

    def script(text: str) -> str:
        # The row asked about is the one named last: examples come before it.
        place = max(range(len(rows)), key=lambda number: text.rfind(LOCAL[name].asks(rows[number])))
        return LOCAL[name].right(rows[place]) if place % share == 0 else "no idea"

    return Scripted(load_tokenizer(lab.student), script)


def scored(answerer: Scripted, name: str, out: Path, tasks: Path, **knobs: int) -> dict[tuple[str, str], Score]:
    asking = Asking(answerer=answerer, folder=out, **knobs)  # type: ignore[arg-type]
    return {(score.metric, score.filter): score for score in lm_task(asking, PAPER[name], [str(tasks)])}


@pytest.mark.parametrize("name", LOCAL)
def test_right_answers_score_and_wrong_ones_do_not(lab: Lab, tmp_path: Path, name: str) -> None:
    rows = write_task(tmp_path / "tasks", name)
    headline = PAPER[name].headline
    assert headline is not None
    half = scored(knows(lab, name, rows, share=2), name, tmp_path / "half", tmp_path / "tasks")[headline]
    assert (half.n, half.estimate.value) == (8, 0.5)
    assert 0.0 < half.estimate.low < 0.5 < half.estimate.high < 1.0


@pytest.mark.parametrize("name", ["bbh", "gsm8k"])
def test_prompts_are_in_the_chat_template_with_the_presets_examples(lab: Lab, tmp_path: Path, name: str) -> None:
    rows = write_task(tmp_path / "tasks", name)
    answerer = knows(lab, name, rows)
    scored(answerer, name, tmp_path / "out", tmp_path / "tasks", limit=2)
    assert len(answerer.asked) == 2
    turn = answerer.tokenizer.render([{"role": "user", "content": "X"}]).partition("X")
    for text, row in zip(answerer.asked, rows):
        assert text.count(turn[0]) == 1 + (PAPER[name].few_shot or 0)
        assert text.endswith(turn[2])
        assert row_of(text, turn[0]).find(LOCAL[name].asks(row)) >= 0


def row_of(text: str, turn: str) -> str:
    return text.rpartition(turn)[2]


def test_an_answer_that_is_begun_stays_open(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "mbpp")
    answerer = knows(lab, "mbpp", rows)
    scored(answerer, "mbpp", tmp_path / "out", tmp_path / "tasks", limit=1)
    assert answerer.asked[0].endswith("\n```python")
    verdicts = next((tmp_path / "out").glob("mbpp_instruct_sandboxed-verdicts-*")).read_text().splitlines()
    assert json.loads(verdicts[1])["value"] == {"passed": True, "reason": ""}


def test_answers_end_where_the_task_says(lab: Lab, tmp_path: Path) -> None:
    """gsm8k ends an answer at the next question; what comes behind it would be the answer else."""
    rows = write_task(tmp_path / "tasks", "gsm8k")
    right = knows(lab, "gsm8k", rows)
    babbling = replace(right, script=lambda text: right.script(text) + "\nQ: Next? The answer is 4711.")
    found = scored(babbling, "gsm8k", tmp_path / "out", tmp_path / "tasks")
    assert found["exact_match", "flexible-extract"].estimate.value == 1.0


def test_what_was_answered_is_not_asked_again(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    answerer = knows(lab, "gsm8k", rows, share=2)
    first = scored(answerer, "gsm8k", tmp_path / "out", tmp_path / "tasks")
    assert len(answerer.asked) == 8
    assert scored(answerer, "gsm8k", tmp_path / "out", tmp_path / "tasks") == first
    assert len(answerer.asked) == 8
    (tmp_path / "tasks" / "gsm8k.jsonl").write_text(
        "".join(json.dumps({**row, "question": row["question"] + " And now?"}) + "\n" for row in rows)
    )
    scored(answerer, "gsm8k", tmp_path / "out", tmp_path / "tasks")
    assert len(answerer.asked) == 16


LOGLIKELIHOOD = """task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {data}.cache
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: {metric}
"""


@pytest.mark.parametrize(
    ("kind", "metric", "word"),
    [
        ("multiple_choice", "acc", "compares likelihoods, which a diffusion model does not have"),
        ("loglikelihood_rolling", "bits_per_byte", "measures perplexity, which a diffusion model does not have"),
    ],
)
def test_tasks_that_do_not_generate_are_refused(lab: Lab, tmp_path: Path, kind: str, metric: str, word: str) -> None:
    rows = write_task(tmp_path / "tasks", "mmlu")
    text = LOGLIKELIHOOD.format(name=kind, data=tmp_path / "tasks" / "mmlu.jsonl", kind=kind, metric=metric)
    (tmp_path / "tasks" / "other.yaml").write_text(text)
    asking = Asking(answerer=knows(lab, "mmlu", rows), folder=tmp_path / "out")
    with pytest.raises(ValueError, match=word):
        lm_task(asking, Preset(task=kind, few_shot=None), [str(tmp_path / "tasks")])


def test_mistakes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    asking = Asking(answerer=knows(lab, "gsm8k", rows), folder=tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: no such folder of tasks"):
        lm_task(asking, PAPER["gsm8k"], ["nowhere"])
    (tmp_path / "tasks" / "gsm8k.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task gsm8k_cot: .*gsm8k\.jsonl"):
        lm_task(asking, PAPER["gsm8k"], [str(tmp_path / "tasks")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval\.txt"):
        lm_task(asking, PAPER["gsm8k"])


def test_an_unknown_task_is_named_after_all_of_lm_evals_were_looked_through(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    class Quick(lm_eval.tasks.TaskManager):
        """Does not read lm-eval's ten thousand files, which takes a quarter of a minute."""

        def __init__(self, include_path: list[Path], include_defaults: bool) -> None:
            looked.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Quick)
    asking = Asking(answerer=knows(lab, "gsm8k", []), folder=tmp_path)
    with pytest.raises(ValueError, match="task 'gsm9k': neither a benchmark of ours nor one that lm-eval knows"):
        lm_task(asking, Preset(task="gsm9k"))
    assert looked == [False, True]


def test_lm_eval_knows_our_model_by_name() -> None:
    from lm_eval.api.registry import get_model

    from megatron_tide.evaluate.lm_model import TideLM

    assert get_model("tide") is TideLM


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("\ndef f(n):\n    return n\n```\nThere.", "def f(n):\n    return n"),
        ("def f(n):\n    return n\n```", "def f(n):\n    return n"),
        ("python\nx = 1```", "x = 1"),
        ("\nx = 1\n```\n```python\ny = 2\n```", "x = 1"),
        ("\ndef f(n):\n    return", ""),
    ],
)
def test_the_code_of_an_answer_begun_in_a_block(answer: str, code: str) -> None:
    assert mbpp.code_of([[answer]], [{}]) == [[code]]
