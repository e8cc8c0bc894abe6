"""MBPP: answers -> code -> programs. Loaded by lm-eval from beside the task's YAML, and by ``lm_harness``."""

from __future__ import annotations

import re
from typing import Any

BLOCK = re.compile(r"```(?:\w*\n)?(.*?)\n?```", re.DOTALL)  # a language stands alone on the first line


def code_of(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The first code block of each answer, which began inside one; nothing where it never ends."""
    return [[_code(response) for response in many] for many in responses]


def _code(response: str) -> str:
    found = BLOCK.search(f"```{response}")
    return found[1] if found else ""


def program_of(doc: dict[str, Any], code: str) -> list[str]:
    """Parts for the sandbox: the code, what the tests need, the tests."""
    return [code, doc.get("test_setup_code") or "", *doc["test_list"]]
