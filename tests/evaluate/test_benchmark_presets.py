"""The paper's benchmarks: settings, tasks that exist, and the published table."""

from __future__ import annotations

import math

import pytest

from megatron_tide.evaluate.benchmark_presets import (
    PAPER,
    changed_preset,
    own_settings,
    preset_of,
    published,
    published_row,
)
from megatron_tide.evaluate.task_index import task_manager


def test_settings_are_those_of_the_paper() -> None:
    """A token a pass, blocks of 32 from the answer on, greedy; three tokens for a letter; examples for BBH only."""
    assert len(PAPER) == 8
    for name, preset in PAPER.items():
        tokens = 3 if name in ("mmlu", "hellaswag") else 256
        assert (preset.new_tokens, preset.steps) == (tokens, tokens)
        assert (preset.block_size, preset.block_layout, preset.temperature) == (32, "answer", 0.0)
        assert preset.few_shot == (3 if name == "bbh" else 0)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_every_task_exists_without_looking_through_all_of_lm_eval(name: str) -> None:
    manager = task_manager(PAPER[name], ())
    assert PAPER[name].task in manager.all_tasks
    assert not PAPER[name].plain_task or PAPER[name].plain_task in manager.all_tasks
    assert len(manager.all_tasks) < 200


def test_the_published_table_is_whole() -> None:
    """Its column averages are the ones the paper prints."""
    table = published()
    assert set(table["rows"]) == set(PAPER)
    assert set(table["shown"]) <= set(table["columns"])
    printed = [40.91, 32.67, 30.55, 30.79, 33.55, 32.25, 33.83, 34.20]
    for place, average in enumerate(printed):
        column = [row[place] for row in table["rows"].values()]
        assert math.isclose(sum(column) / 8, average, abs_tol=0.0051)
    assert published_row("humaneval")["B: Shared"] == 48.78
    assert published_row("another") == {}


def test_changes_are_made_and_checked() -> None:
    assert changed_preset("gsm8k", "paper", {"new_tokens": None, "steps": None}) == PAPER["gsm8k"]
    changed = changed_preset("gsm8k", "paper", {"new_tokens": 64, "steps": None, "temperature": 0.5})
    assert (changed.new_tokens, changed.steps, changed.temperature) == (64, 64, 0.5)
    assert changed_preset("gsm8k", "paper", {"new_tokens": 64, "steps": 10}).steps == 10
    assert changed_preset("humaneval", "paper", {"chat_template": False}).task == "humaneval_sandboxed"
    assert preset_of("somebody's task").few_shot is None
    for mistake in ({"new_tokens": 0}, {"steps": 0}, {"temperature": -1.0}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="gsm8k: "):
            changed_preset("gsm8k", "paper", mistake)


@pytest.mark.parametrize(
    ("stated", "given", "expected", "unused"),
    [
        ({"max_gen_toks": 900}, {}, (900, 900, 0.0), []),
        ({"max_new_tokens": 7, "do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}, (7, 7, 0.6), ["top_p"]),
        ({"temperature": 0.6, "do_sample": False}, {}, (256, 256, 0.0), []),
        ({"max_gen_toks": 900, "temperature": 1}, {"new_tokens": 5, "temperature": 0.5}, (5, 5, 0.5), []),
        ({"max_gen_toks": 900}, {"steps": 9}, (900, 9, 0.0), []),
        ({"do_sample": True}, {}, (256, 256, 0.0), ["do_sample"]),
        ({"do_sample": True}, {"temperature": 0.0}, (256, 256, 0.0), []),
    ],
)
def test_a_task_outside_the_paper_keeps_its_own_settings(stated, given, expected, unused) -> None:  # type: ignore[no-untyped-def]
    preset = changed_preset("somebody's task", "paper", given)
    found, left = own_settings(preset, "t", {"until": ["x"], **stated})
    assert ((found.new_tokens, found.steps, found.temperature), left) == (expected, unused)
    assert own_settings(PAPER["gsm8k"], "t", {"max_gen_toks": 900})[0] == PAPER["gsm8k"]


@pytest.mark.parametrize("stated", [{"max_gen_toks": "many"}, {"max_gen_toks": 0}, {"temperature": [1]}])
def test_settings_of_a_task_that_are_no_numbers(stated) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"task t: .*set both with flags"):
        own_settings(preset_of("t"), "t", stated)
