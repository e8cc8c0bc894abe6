"""Phases and growing blocks: parsed with one-line errors, and pure functions of the step."""

from __future__ import annotations

import pytest

from megatron_tide.config import StrategyConfig
from megatron_tide.objectives import build_strategy
from megatron_tide.train.phases import build_phases


def phases(total=10, block=32, **flags):
    config = StrategyConfig(**{"strategy": "tide-cross", **flags})
    return build_phases(config, build_strategy(config, None), total, block)


def names(found, total=10):
    return [found.at(step).strategy.name for step in range(total)]


def test_without_flags_the_whole_run_is_one_phase():
    found = phases()
    assert names(found) == ["tide-cross"] * 10
    assert [found.block(step) for step in range(10)] == [32] * 10
    assert [found.at(step).progress(step) for step in range(10)] == [step / 10 for step in range(10)]
    assert found.metrics(3) == {}


def test_shares_of_the_steps_in_order():
    found = phases(pretraining="ar:0.4,joint:0.3", block_growth="8:0.5, 16:0.25")
    assert names(found) == ["ar"] * 4 + ["joint"] * 3 + ["tide-cross"] * 3
    assert [found.block(step) for step in range(10)] == [8] * 5 + [16] * 3 + [32] * 2
    assert [found.at(step).progress(step) for step in (4, 6, 7, 9)] == [0, 2 / 3, 0, 2 / 3]
    assert found.metrics(4) == {"train/phase": 1, "train/block_size": 8}
    assert found.describe() == [
        {"strategy": "ar", "end": 4},
        {"strategy": "joint", "end": 7},
        {"strategy": "tide-cross", "end": 10},
    ]


def test_a_share_of_no_step_and_no_rest():
    assert names(phases(pretraining="ar:0.04,joint:0.96")) == ["joint"] * 10
    assert names(phases(pretraining="bd3lm:1")) == ["bd3lm"] * 10


def test_flags_of_the_last_strategy_do_not_reach_the_first_ones():
    found = phases(pretraining="joint:0.5", chunk_objective="calm", tidal="weight", tidal_midrange=True, compdemo=True)
    assert not found.at(0).strategy.needs_teacher
    assert found.last.strategy.chunk.objective.name == "calm"
    config = StrategyConfig(strategy="kl", pretraining="ar:0.5", distribution_rows="byte_prefix")
    assert not build_phases(config, found.last.strategy, 10, 32).at(0).strategy.needs_teacher


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"pretraining": "ar"},
            "--pretraining ar: could not convert string to float: ''; use NAME:SHARE,... such as ar:",
        ),
        ({"pretraining": "jont:0.5"}, "--pretraining jont:0.5: unknown strategy 'jont'; use one of bd3lm, ar, joint"),
        ({"pretraining": "calm:0.5"}, "calm needs a teacher; only --strategy, which comes last, can have one"),
        ({"pretraining": "ar:0"}, "--pretraining ar:0: shares of the run must be above 0, and at most 1 in sum"),
        ({"pretraining": "ar:-0.1"}, "must be above 0"),
        ({"pretraining": "ar:nan"}, "must be above 0"),
        ({"pretraining": "ar:0.6,joint:0.6"}, "at most 1 in sum"),
        ({"block_growth": "12:0.5"}, "--block-growth 12:0.5: 12 is not a divisor of 32, the block size that the data"),
        ({"block_growth": "64:0.5"}, "64 is not a divisor of 32"),
        ({"block_growth": "0:0.5"}, "0 is not a divisor of 32"),
        ({"block_growth": "8:0.5,,"}, " is not a divisor of 32"),
        ({"score_prompt": True}, "--score-prompt has no effect: no phase has a next-token loss"),
    ],
)
def test_mistakes(flags, said):
    with pytest.raises(ValueError, match=r"^--") as refused:
        phases(**flags)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
