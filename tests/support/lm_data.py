"""Task data in the format of the public sets, and tasks that read it: lm-eval's own, with other data under them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks

THEIRS = Path(lm_eval.tasks.__file__).parent
OURS = Path(__file__).resolve().parents[2] / "megatron_tide" / "evaluate" / "tasks"

Row = dict[str, Any]


@dataclass(frozen=True)
class Local:
    """One benchmark on local data: the task that is asked, its rows, and what a model that knows row n answers."""

    yaml: Path
    split: str
    row: Callable[[int], Row]
    right: Callable[[Row], str]
    asks: Callable[[Row], str]
    """A piece of the prompt that only this row's has."""
    group: str = ""
    others: tuple[str, ...] = ()
    """Splits that lm-eval wants to see for examples, even where none is asked for."""


def letter(number: int) -> str:
    return "ABCD"[number % 4]


def mbpp_row(number: int) -> Row:
    tests = [f"assert plus_{number}({n}) == {n + number}" for n in (0, 1, 5)]
    return {
        "task_id": number,
        "text": f"Write a function plus_{number} that adds {number}.",
        "code": f"def plus_{number}(n):\n    return n + {number}",
        "test_list": tests,
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def multiple_choice(number: int) -> Row:
    return {
        "question": f"Which number is {number}?",
        "choices": [str(number + shift - number % 4) for shift in range(4)],
        "answer": number % 4,
        "subject": "abstract_algebra",
    }


LOCAL: dict[str, Local] = {
    "gsm8k": Local(
        yaml=THEIRS / "gsm8k" / "gsm8k-cot.yaml",
        split="test",
        row=lambda n: {"question": f"Ann has {n} pens and buys 5.", "answer": f"{n} + 5 = {n + 5}\n#### {n + 5}"},
        right=lambda row: f"The answer is {row['answer'].split()[-1]}.",
        asks=lambda row: row["question"],
    ),
    "math": Local(
        yaml=THEIRS / "minerva_math" / "minerva_math_algebra.yaml",
        split="test",
        row=lambda n: {"problem": f"Find $x = {n}/7$.", "solution": f"It is $\\boxed{{\\frac{{{n}}}{{7}}}}$."},
        right=lambda row: (
            f"Final Answer: The final answer is ${row['solution'].split('boxed{')[1][:-3]}$. I hope it is correct."
        ),
        asks=lambda row: row["problem"],
        group="minerva_math",
    ),
    "bbh": Local(
        yaml=THEIRS / "bbh" / "cot_fewshot" / "boolean_expressions.yaml",
        split="test",
        row=lambda n: {"input": f"not not not {n % 2 == 0} or {n} == 99 is", "target": str(n % 2 == 1)},
        right=lambda row: f"We see it. So the answer is {row['target']}.",
        asks=lambda row: row["input"],
        group="bbh",
    ),
    "mmlu_pro": Local(
        yaml=THEIRS / "mmlu_pro" / "mmlu_pro_biology.yaml",
        split="test",
        row=lambda n: {
            "question": f"Which number is {n}?",
            "options": [str(n - n % 4 + k) for k in range(4)],
            "answer": letter(n),
            "category": "biology",
            "cot_content": "",
        },
        right=lambda row: f"So the answer is ({row['answer']}).",
        asks=lambda row: row["question"],
        group="mmlu_pro",
        others=("validation",),
    ),
    "hellaswag": Local(
        yaml=OURS / "hellaswag_generative.yaml",
        split="validation",
        row=lambda n: {
            "activity_label": "Counting",
            "ctx_a": f"She counts to {n}.",
            "ctx_b": "then she",
            "endings": [f"[substeps] says {n - n % 4 + k} aloud." for k in range(4)],
            "label": str(n % 4),
        },
        right=lambda row: "ABCD"[int(row["label"])],
        asks=lambda row: row["ctx_a"],
        others=("train",),
    ),
    "mmlu": Local(
        yaml=THEIRS / "mmlu" / "generative" / "mmlu_abstract_algebra.yaml",
        split="test",
        row=multiple_choice,
        right=lambda row: " " + "ABCD"[row["answer"]],
        asks=lambda row: row["question"],
        group="mmlu_generative",
        others=("dev",),
    ),
    "mbpp": Local(
        yaml=OURS / "mbpp_instruct_sandboxed.yaml",
        split="test",
        row=mbpp_row,
        right=lambda row: f"{row['code']}\n```\nThis adds.",
        asks=lambda row: row["text"],
    ),
}


def write_task(folder: Path, name: str, count: int = 8) -> list[Row]:
    """Tasks for ``--include-path``: lm-eval's (or ours) of that benchmark, on ``count`` local rows; -> the rows."""
    local = LOCAL[name]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [local.row(number) for number in range(count)]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = next(line.split(":")[1].strip(' "') for line in local.yaml.read_text().splitlines() if "task" in line[:6])
    lines = [f"include: {local.yaml}", f"task: {task}", "dataset_path: json", "dataset_name: null"]
    lines += ["dataset_kwargs:", f"  cache_dir: {folder / 'cache'}", "  data_files:"]
    lines += [f"    {split}: {data}" for split in (local.split, *local.others)]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    if local.group:
        (folder / f"{name}-group.yaml").write_text(f"group: {local.group}\ntask:\n  - {task}\n")
    return rows
