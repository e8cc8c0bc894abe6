"""lm-eval's tasks asked of our models, on local data in the public sets' format."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
from pathlib import Path

import lm_eval.tasks
import pytest
import torch

from megatron_tide.evaluate.benchmark_presets import PAPER, BenchmarkPreset, preset_of
from megatron_tide.evaluate.generators import open_generator
from megatron_tide.evaluate.harness import EvalContext, MetricScore, run_benchmark, user_secret
from megatron_tide.evaluate.response_cache import Store
from megatron_tide.evaluate.task_functions import first_code_block, mbpp_program
from megatron_tide.evaluate.task_functions import tested_names as names_tested
from megatron_tide.evaluate.task_index import task_manager
from megatron_tide.evaluate.thoughts import STILL_THINKING
from megatron_tide.sandbox import run_programs
from tests.support.answering import Scripted, write_autoregressive
from tests.support.lab import Lab
from tests.support.lm_data import LOCAL, Row, write_task


def knows(lab: Lab, name: str, rows: list[Row], share: int = 1) -> Scripted:
    """Answers every ``share``-th row rightly, the others with a wrong word."""

    def script(text: str) -> str:
        # The row asked about is the one named last: examples come before it.
        place = max(range(len(rows)), key=lambda number: text.rfind(LOCAL[name].asks(rows[number])))
        return LOCAL[name].right(rows[place]) if place % share == 0 else "no idea"

    return Scripted(lab.student, script)


def context(generator: object, out: Path, *tasks: Path, **more: int) -> EvalContext:
    include = [str(folder) for folder in tasks]
    return EvalContext(name="m", path="p", generator=generator, folder=out, include_path=include, **more)  # type: ignore[arg-type]


def scored(generator: object, name: str, out: Path, tasks: Path, **more: int) -> dict[tuple[str, str], MetricScore]:
    found = run_benchmark(name, PAPER[name], context(generator, out, tasks, **more))
    return {(score.metric, score.filter): score for score in found.scores}


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
    generator = knows(lab, name, rows)
    scored(generator, name, tmp_path / "out", tmp_path / "tasks", limit=2)
    assert len(generator.asked) == 2
    turn = generator.text_tokenizer.render([{"role": "user", "content": "X"}]).partition("X")
    for text, row in zip(generator.asked, rows):
        assert text.count(turn[0]) == 1 + (PAPER[name].few_shot or 0)
        assert text.endswith(turn[2])
        assert text.rpartition(turn[0])[2].find(LOCAL[name].asks(row)) >= 0


def test_an_answer_that_is_begun_stays_open(lab: Lab, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(write_task(tmp_path / "tasks", "mbpp")).replace("plus_0", "sum"))  # a builtin's name
    (tmp_path / "tasks" / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = knows(lab, "mbpp", rows)
    scored(generator, "mbpp", tmp_path / "out", tmp_path / "tasks", limit=1)
    assert generator.asked[0].endswith("\n```python")
    kept = next((tmp_path / "out").glob("mbpp_instruct_sandboxed-*.jsonl")).read_text().splitlines()
    (verdict,) = json.loads(kept[1])["verdicts"]
    assert (verdict["passed"], verdict["reason"]) == (True, "")


def test_answers_end_where_the_task_says(lab: Lab, tmp_path: Path) -> None:
    """gsm8k ends an answer at the next question; what comes behind it would be the answer else."""
    rows = write_task(tmp_path / "tasks", "gsm8k")
    right = knows(lab, "gsm8k", rows)
    babbling = Scripted(lab.student, lambda text: right.script(text) + "\nQ: Next? The answer is 4711.")
    found = scored(babbling, "gsm8k", tmp_path / "out", tmp_path / "tasks")
    assert found["exact_match", "flexible-extract"].estimate.value == 1.0


def test_what_was_answered_is_not_asked_again(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    generator = knows(lab, "gsm8k", rows, share=2)
    first = scored(generator, "gsm8k", tmp_path / "out", tmp_path / "tasks")
    assert len(generator.asked) == 8
    assert scored(generator, "gsm8k", tmp_path / "out", tmp_path / "tasks") == first
    assert len(generator.asked) == 8
    (tmp_path / "tasks" / "gsm8k.jsonl").write_text(
        "".join(json.dumps({**row, "question": row["question"] + " And now?"}) + "\n" for row in rows)
    )
    scored(generator, "gsm8k", tmp_path / "out", tmp_path / "tasks")
    assert len(generator.asked) == 16


def test_verdicts_that_come_with_a_folder_are_not_believed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user evaluates, then declares every program right and publishes the folder."""
    rows = write_task(tmp_path / "tasks", "mbpp")
    headline = PAPER["mbpp"].headline
    assert headline is not None
    for user in ("other", "me"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / user))
        found = scored(knows(lab, "mbpp", rows, share=2), "mbpp", tmp_path / "out", tmp_path / "tasks", limit=2)
        assert found[headline].estimate.value == 0.5
        for path in (tmp_path / "out").glob("cache-*.sqlite"):
            with sqlite3.connect(path) as database:
                values = {key: json.loads(value) for key, value in database.execute("select key, value from unnamed")}
            judged = {key: value for key, value in values.items() if isinstance(value, dict) and "passed" in value}
            assert judged
            Store(path).update({key: value | {"passed": True} for key, value in judged.items()})
    assert len(list((tmp_path / "out").glob("cache-*.sqlite"))) == 2


def test_the_secret_of_a_user_is_one_and_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    first = user_secret()
    assert user_secret() == first
    (file,) = (tmp_path / "a" / "megatron_tide").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert user_secret() != first
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    with pytest.raises(ValueError, match="evaluation-secret: is corrupt"):
        user_secret()


def test_a_task_of_the_users_is_asked_with_its_own_settings(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    more = "generation_kwargs:\n  until: ['Q:']\n  max_gen_toks: 900\n  top_k: 5\n"
    with (tmp_path / "tasks" / "gsm8k.yaml").open("a") as file:
        file.write(more)
    asked, generator = [], knows(lab, "gsm8k", rows)
    tell = generator.generate_until
    generator.generate_until = lambda all, **more: asked.extend(one.args[1] for one in all) or tell(all)  # type: ignore[method-assign]
    where = context(generator, tmp_path / "out", tmp_path / "tasks", limit=1)
    result = run_benchmark("gsm8k_cot", preset_of("gsm8k_cot"), where)
    assert (asked[0]["max_new_tokens"], result.settings["max_new_tokens"], result.preset.steps) == (900, 900, 900)
    assert result.notes == ["task gsm8k_cot: its settings top_k are not used"]


@pytest.mark.parametrize("heat", [0.0, 0.7])
def test_repeated_requests_of_a_task_are_draws_of_their_own(lab: Lab, tmp_path: Path, heat: float) -> None:
    """As for a majority of answers: at a temperature, each repetition has its own key and settings."""
    rows = write_task(tmp_path / "tasks", "gsm8k")
    with (tmp_path / "tasks" / "gsm8k.yaml").open("a") as file:
        file.write(f"repeats: 3\ngeneration_kwargs:\n  until: ['Q:']\n  do_sample: true\n  temperature: {heat}\n")
    generator = knows(lab, "gsm8k", rows)
    for again in (False, True):  # then, all are kept
        asked, tell = [], type(generator).generate_until
        generator.generate_until = lambda all, **_: asked.extend(all) or tell(generator, all)  # type: ignore[method-assign] # noqa: B023
        where = context(generator, tmp_path / "out", tmp_path / "tasks", limit=1)
        result = run_benchmark("gsm8k_cot", preset_of("gsm8k_cot"), where)
        numbers = [one.args[1].get("repeat") for one in asked]
        assert numbers == ([None, 1, 2] if heat else [None] * 3) * (not again)
        assert result.notes == ([] if heat else ["task gsm8k_cot: its settings do_sample are not used"])


def test_numbers_that_are_no_means_of_samples_are_told(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    with (tmp_path / "tasks" / "gsm8k.yaml").open("a") as file:
        file.write("metric_list:\n  - metric: exact_match\n    aggregation: median\n  - metric: bleu\n")
    where = context(knows(lab, "gsm8k", rows, share=3), tmp_path / "out", tmp_path / "tasks")
    result = run_benchmark("gsm8k_cot", preset_of("gsm8k_cot"), where)
    notes = [note.partition(" is not a mean over samples; lm-eval has ")[0] for note in result.notes]
    assert "task gsm8k_cot: its bleu (flexible-extract)" in notes
    assert {score.metric for score in result.scores} == {"exact_match"}


def test_models_in_one_folder_do_not_mix(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    first, second = knows(lab, "gsm8k", rows), knows(lab, "gsm8k", rows, share=2)
    torch.nn.init.zeros_(second.model.weight)
    for generator, value in ((first, 1.0), (second, 0.5)):
        found = scored(generator, "gsm8k", tmp_path / "out", tmp_path / "tasks")
        assert found["exact_match", "flexible-extract"].estimate.value == value
        assert len(generator.asked) == 8
    assert len(list((tmp_path / "out").glob("cache-*.sqlite"))) == 2
    assert len(list((tmp_path / "out").glob("gsm8k_cot-*.jsonl"))) == 2


def test_a_samples_file_says_what_it_holds(lab: Lab, tmp_path: Path) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    generator = knows(lab, "gsm8k", rows, share=2)
    asked = context(generator, tmp_path / "out", tmp_path / "tasks")
    result = run_benchmark("gsm8k", PAPER["gsm8k"], asked)
    (file,) = (tmp_path / "out").glob("*.jsonl")
    settings, *samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert settings == {"settings": result.settings} == {"settings": asked.settings(PAPER["gsm8k"])}
    mine = [sample for sample in samples if sample["filter"] == "flexible-extract"]
    assert [sample["key"] for sample in mine] == [f"gsm8k_cot/{number}" for number in range(8)]
    assert [sample["prompt"] for sample in mine] == generator.asked
    whole = file.read_bytes()
    run_benchmark("gsm8k", PAPER["gsm8k"], context(generator, tmp_path / "out", tmp_path / "tasks", limit=1))
    assert file.read_bytes() == whole, "a look at the first sample has a file of its own"
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 2
    assert [sample["answers"] for sample in mine] == [[generator.script(prompt)] for prompt in generator.asked]
    assert [sample["scores"] for sample in mine] == [{"exact_match": float(number % 2 == 0)} for number in range(8)]


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


def write_likelihood_task(folder: Path, kind: str, metric: str) -> None:
    write_task(folder, "mmlu")
    text = LOGLIKELIHOOD.format(name=kind, data=folder / "mmlu.jsonl", kind=kind, metric=metric)
    (folder / "other.yaml").write_text(text)


@pytest.mark.parametrize(
    ("kind", "metric", "word"),
    [
        ("multiple_choice", "acc", "compares likelihoods, which a diffusion model does not have"),
        ("loglikelihood_rolling", "bits_per_byte", "measures perplexity, which a diffusion model does not have"),
    ],
)
def test_tasks_that_do_not_generate_are_for_autoregressive_models(
    lab: Lab, tmp_path: Path, kind: str, metric: str, word: str
) -> None:
    write_likelihood_task(tmp_path / "tasks", kind, metric)
    preset = BenchmarkPreset(task=kind, few_shot=None, chat_template=False)
    block = open_generator(str(lab.student), torch.float32, "cpu", 2)
    with pytest.raises(ValueError, match=word):
        run_benchmark(kind, preset, context(block, tmp_path / "out", tmp_path / "tasks"))
    if kind == "multiple_choice":
        baseline = write_autoregressive(tmp_path / "ar", lab.student)
        generator = open_generator(str(baseline), torch.float32, "cpu", 2)
        (score,) = run_benchmark(kind, preset, context(generator, tmp_path / "ar-out", tmp_path / "tasks")).scores
        assert (score.metric, score.n) == ("acc", 8)


def test_mistakes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    generator = knows(lab, "gsm8k", rows)
    with pytest.raises(ValueError, match="nowhere: no such folder of tasks"):
        run_benchmark("gsm8k", PAPER["gsm8k"], context(generator, tmp_path / "out", Path("nowhere")))
    (tmp_path / "tasks" / "gsm8k.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task gsm8k_cot: .*gsm8k\.jsonl"):
        run_benchmark("gsm8k", PAPER["gsm8k"], context(generator, tmp_path / "out", tmp_path / "tasks"))
    for wrong in ({"samples_per_problem": 0}, {"limit": -1}, {"workers": -1}):
        with pytest.raises(ValueError, match="1 or more, a limit and workers 0 or more"):
            context(generator, tmp_path, **wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval\.txt"):
        run_benchmark("gsm8k", PAPER["gsm8k"], context(generator, tmp_path / "out"))


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
    for name, index in (("gsm9k", []), ("dataset_path", [False, True])):  # a word of none, and of many of their files
        with pytest.raises(ValueError, match=f"task '{name}': neither a benchmark of ours nor one that lm-eval knows"):
            run_benchmark(name, BenchmarkPreset(task=name), context(knows(lab, "gsm8k", []), tmp_path))
        assert looked == index


BROKEN = {
    "no YAML": ("task: gsm8k_cot\nuntil: [", "lm-eval cannot read it"),
    "a list": ("- task: gsm8k_cot", "a list, not an object"),
    "an include that is not there": ("task: gsm8k_cot\ninclude: nowhere", "includes 'nowhere'"),
    "an anchor without its place": ("task: gsm8k_cot\nuntil: *none", "undefined alias"),
    "another tag": ("task: gsm8k_cot\nuntil: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a name that is a number": ("task: 5", "a task, group or tag is no text"),
    "no name": ("task:", "a task, group or tag is no text"),
    "a tag that is a number": ("task: other\ntag: [5]", "a task, group or tag is no text"),
}
WRONG = {  # in place of what the right file has
    "code that is not there": "doc_to_text: !function nowhere.f",
    "code of another file that is not there": "metric_list:\n- metric: !function utils.f",
    "a template": "doc_to_text: '{{ question | nothing }}'",
    "a column": "doc_to_text: '{{ questions.first }}'",
    "a metric": "metric_list:\n- metric: nothing",
    "settings": "generation_kwargs: 5",
    "stop strings": "generation_kwargs:\n  until: 5",
    "a filter": "filter_list:\n- name: x\n  filter:\n  - function: nothing",
    "filters": "filter_list: 5",
    "a split": "test_split: nothing",
    "a kind of task": "output_type: nothing",
    "a key": "nothing: 5",
    "a list of stop strings": "generation_kwargs:\n  until: ['x', 5]",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_tasks_is_one_line(lab: Lab, tmp_path: Path, name: str) -> None:
    write_task(tmp_path / "tasks", "gsm8k")
    text, word = BROKEN[name]
    (tmp_path / "tasks" / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{word}"):
        task_manager(BenchmarkPreset(task="gsm8k_cot"), [str(tmp_path / "tasks")])


def test_other_files_beside_a_task_are_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [another")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function code.f\noutput_type: generate_until")
    assert "mine" in task_manager(BenchmarkPreset(task="mine"), [str(tmp_path)]).all_tasks
    os.mkfifo(tmp_path / "waits.yaml")
    with pytest.raises(OSError, match=r"waits\.yaml: not a regular file"):
        task_manager(BenchmarkPreset(task="mine"), [str(tmp_path)])


@pytest.mark.parametrize("name", WRONG)
def test_a_task_that_is_written_wrongly_is_one_line(lab: Lab, tmp_path: Path, name: str) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    with (tmp_path / "tasks" / "gsm8k.yaml").open("a") as file:
        file.write(WRONG[name] + "\n")
    with pytest.raises(ValueError, match="task gsm8k_cot: "):
        run_benchmark("gsm8k", PAPER["gsm8k"], context(knows(lab, "gsm8k", rows), tmp_path / "out", tmp_path / "tasks"))


def test_errors_of_our_own_code_keep_their_type(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_task(tmp_path / "tasks", "gsm8k")
    generator = knows(lab, "gsm8k", rows)
    monkeypatch.setattr(generator, "generate_until", lambda *a, **k: {}["a bug"])
    with pytest.raises(KeyError):
        run_benchmark("gsm8k", PAPER["gsm8k"], context(generator, tmp_path / "out", tmp_path / "tasks"))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("\ndef f(n):\n    return n\n```\nThere.", "def f(n):\n    return n"),
        ("def f(n):\n    return n\n```", "def f(n):\n    return n"),
        ("python\nx = 1```", "x = 1"),
        ("\nx = 1\n```\n```python\ny = 2\n```", "x = 1"),
        ("\ndef f(n):\n    return n", "def f(n):\n    return n"),
        ("\n```python\ndef f(n):\n    return n\n```\nThere.", "def f(n):\n    return n"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer_begun_in_a_block(answer: str, code: str) -> None:
    assert first_code_block([[answer]], [{}]) == [[code]]


def test_mbpp_s_tests_have_the_imports_of_the_problems_own_solution() -> None:
    doc = {
        "code": "import sys\ndef f(x): return sys.getsizeof(x)",
        "test_list": ["assert f('a') == sys.getsizeof('a')"],
    }
    fake = "class sys: getsizeof = staticmethod(lambda x: 0)\ndef f(x): return 0"
    programs = [mbpp_program(doc, code) for code in (doc["code"], fake)]
    assert [one.passed for one in run_programs(programs, tested=[names_tested(doc)] * 2)] == [True, False]


def test_unfinished_thoughts_are_wrong_answers_and_counted(lab: Lab, tmp_path: Path) -> None:
    """The number that was asked for stands in the thoughts; kept answers are counted again."""
    rows = write_task(tmp_path / "tasks", "gsm8k")
    right = knows(lab, "gsm8k", rows)
    thinking = Scripted(lab.student, lambda text: ("<think>" if "0" in text else "") + right.script(text))
    told = sum("0" in prompt for prompt in _asked(thinking, tmp_path))
    assert 0 < told < 8
    for _ in range(2):
        result = run_benchmark("gsm8k", PAPER["gsm8k"], context(thinking, tmp_path / "out", tmp_path / "tasks"))
        assert [note for note in result.notes if "thinking" in note] == [f"{told} of 8 answers {STILL_THINKING}"]
        found = {(score.metric, score.filter): score.estimate.value for score in result.scores}
        assert found["exact_match", "flexible-extract"] == 1 - told / 8
    assert len(thinking.asked) == 8 * 2


def _asked(generator: Scripted, folder: Path) -> list[str]:
    run_benchmark("gsm8k", PAPER["gsm8k"], context(generator, folder / "first", folder / "tasks"))
    return generator.asked[:8]
