"""The judge of completions: code that parses and says something; text that would hurt a parser; nothing is run."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_tide.evaluate.completions import LONGEST, Completions, code_of, parses, says_something

GOOD = "if tz is not None:\n    t = t.astimezone(tz)\nreturn cls(t.year, t.month)\n"
JUDGED = {  # text: parses, says something
    "": (False, False),
    "\n  \n": (False, False),
    "# a remark alone is no statement, however long it is": (False, True),
    "Sure! Here is the body of the function that you asked for.": (False, True),
    "return self._t": (True, False),
    "return self._t\n" * 3: (True, False),
    "if a:\n    return self._t\nelse:\n  return self._t\nfor x in y:\n        return self._t\n": (True, False),
    "return self._type_name\n" * 2: (True, True),
    GOOD: (True, True),
    "        " + GOOD.replace("\n", "\n        "): (True, True),
    "async with self.lock:\n    yield await self.value(1, 2, 3)": (True, True),
    GOOD + "\nif x:": (False, True),
    "return '\\d+ is an escape that the parser warns of'": (True, True),
}


@pytest.mark.parametrize("text", JUDGED)
def test_cases(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (parses(text), says_something(text)) == JUDGED[text]


HOSTILE = """
import sys
from megatron_tide.evaluate.completions import LONGEST, parses
for text in ("(", "[", "-", "not ", "lambda: ", "a.", "a(", "1+", "x if y else ", "f'{", "{1:", "if a:", "@a"):
    for tail in ("", "1", "1" + ")" * 4000):
        parses(text * ((LONGEST - len(tail)) // len(text)) + tail)
nested = "".join(" " * depth + "if x:\\n" for depth in range(195))
assert not parses(nested + " " * 195 + "pass")
assert not any(map(parses, ("pass\\0", "x = '\\ud800\\0'", "pass\\n" * LONGEST)))
parses("x = '\\ud800'")
"""


def test_no_text_ends_the_judge() -> None:
    """In a process of its own: a parser that overflows takes its process with it."""
    assert len("pass") < LONGEST
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_is_run(tmp_path: Path) -> None:
    assert parses(f"open({str(tmp_path / 'made')!r}, 'w').close()")
    assert not list(tmp_path.iterdir())


def test_counts_and_length() -> None:
    found = Completions(["return self._t\n", GOOD, "Sure, I can do that for you in a moment."], ["p"] * 3, ["r"] * 3)
    record = found.to_dict(seed=0)
    assert [record[name] for name in ("count", "parse", "say_something", "both")] == [3, 2, 2, 1]
    assert record["both_share"]["value"] == pytest.approx(1 / 3)
    assert record["both_share"]["low"] == 0.0
    assert record["mean_characters"] == pytest.approx((14 + len(GOOD) - 1 + 40) / 3)
    assert [one["text"] for one in record["texts"]] == found.texts


FENCED = {
    "```python\n" + GOOD + "```\nIt returns a new object.": GOOD,
    "Sure:\n\n  ```\n" + GOOD + "  ```": GOOD,
    "```py\n" + GOOD: GOOD,  # cut at the maximum length
    "```\nx = 1\n```\nor\n```\ny = 2\n```": "x = 1\n",
    GOOD: GOOD,
    "x = '```'": "x = '```'",
    "```": "```",
    "": "",
}


@pytest.mark.parametrize("text", FENCED)
def test_the_code_inside_a_fence_is_judged(text: str) -> None:
    assert code_of(text) == FENCED[text]
    (judged,) = Completions([text], ["p"], ["r"]).to_dict(seed=0)["texts"]
    assert judged == {
        "text": text, "parses": parses(FENCED[text]), "says_something": says_something(FENCED[text])
    }  # fmt: skip
