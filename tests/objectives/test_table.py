"""Names and switches -> strategies: what builds, what is refused with one line, what warns."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_tide import choices
from megatron_tide.choices import TIDAL_AXES, TIDAL_RAMPS, TIDAL_USES
from megatron_tide.config import StrategyConfig
from megatron_tide.diffusion import MASKINGS, CompDemo, NoiseSampling
from megatron_tide.objectives import CHUNK_OBJECTIVES, DISTRIBUTION_OBJECTIVES, STRATEGIES, build_strategy
from tests.objectives.handmade import MAPPED, SHARED

NAMES = ["bd3lm", "ar", "joint", "calm", "tide-cross", "tide-shared", "kl", "reverse-kl", "bernoulli-kl", "tide-bridge"]


def build(bridge=MAPPED, **switches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_strategy(StrategyConfig(**switches), bridge)


def test_the_names_are_the_documented_ones():
    assert list(STRATEGIES) == NAMES
    assert all(recipe.meaning for recipe in STRATEGIES.values())


def test_the_command_line_offers_what_the_tables_hold():
    offered = {field.name: field.metadata.get("choices") for field in dataclasses.fields(StrategyConfig)}
    tables = {
        "strategy": STRATEGIES,
        "chunk_objective": {"none": None, **CHUNK_OBJECTIVES},
        "distribution_objective": {"none": None, **DISTRIBUTION_OBJECTIVES},
        "tidal": TIDAL_USES,
        "tidal_axes": TIDAL_AXES,
        "tidal_ramp": TIDAL_RAMPS,
        "masking": MASKINGS,
        "timesteps": choices.TIMESTEPS,
        "timestep_sampling": choices.TIMESTEP_SAMPLINGS,
        "mask_count": choices.MASK_COUNTS,
    }
    assert {name: set(offered[name]) for name in tables} == {name: set(table) for name, table in tables.items()}


TABLES = {name: table for name, table in vars(choices).items() if isinstance(table, choices.Registry)}


@pytest.mark.parametrize("table", TABLES)
def test_every_word_has_a_meaning_and_code_that_calls_itself_the_same(table):
    for word, choice in TABLES[table].data.items():
        assert choice.meaning
        found = choice.load()
        assert getattr(found, "name", word) == word
        assert TABLES[table][word] is found


@pytest.mark.parametrize("bridge", [MAPPED, SHARED], ids=["two vocabularies", "one vocabulary"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "ar"])
def test_every_name_builds_with_every_switch(name, bridge):
    objectives = itertools.product([None, *CHUNK_OBJECTIVES], [None, *DISTRIBUTION_OBJECTIVES])
    uses = itertools.product([None, *TIDAL_USES], TIDAL_AXES, TIDAL_RAMPS, [False, True])
    demos = itertools.product([None, True, False], ["bernoulli", "exact"], ["chunk", "token"], MASKINGS)
    everything = itertools.product(objectives, uses, demos)
    built = 0
    for (chunk, rows), (tidal, axes, ramp, midrange), (compdemo, split, unit, masking) in everything:
        if name in ("bd3lm", "joint") and chunk is rows is None:
            continue  # without a teacher there is nothing to switch: see the refusals below
        strategy = build(
            bridge,
            strategy=name,
            chunk_objective=chunk,
            distribution_objective=rows,
            tidal=tidal,
            tidal_axes=axes,
            tidal_ramp=ramp,
            tidal_midrange=midrange,
            compdemo=compdemo,
            compdemo_split=split,
            compdemo_unit=unit,
            masking=masking,
        )
        assert strategy.needs_teacher
        assert strategy.masking is MASKINGS[masking]
        if compdemo:
            assert strategy.compdemo == CompDemo(ratio=0.5, exact=split == "exact", by_token=unit == "token")
        if compdemo is False:
            assert strategy.compdemo is None
        built += 1
    assert built > 1000


@pytest.mark.parametrize(
    ("name", "bridge", "needs_target_logprobs", "needs_hidden", "compdemo"),
    [
        ("bd3lm", None, False, False, False),
        ("ar", None, False, False, False),
        ("joint", None, False, False, False),
        ("calm", None, True, False, False),
        ("tide-cross", None, True, False, False),
        ("bernoulli-kl", None, True, False, False),
        ("tide-shared", SHARED, False, True, True),
        ("tide-shared", MAPPED, True, False, True),
        ("kl", MAPPED, False, True, False),
        ("reverse-kl", SHARED, False, True, False),
        ("tide-bridge", MAPPED, True, True, True),
    ],
)
def test_what_a_name_asks_of_the_teacher(name, bridge, needs_target_logprobs, needs_hidden, compdemo):
    strategy = build(bridge, strategy=name)
    assert (strategy.needs_target_logprobs, strategy.needs_hidden) == (needs_target_logprobs, needs_hidden)
    assert strategy.needs_teacher == (needs_target_logprobs or needs_hidden)
    assert (strategy.compdemo is not None) == compdemo
    assert strategy.distill_weight == 1.0


@pytest.mark.parametrize("switch", ["timesteps", "timestep_sampling", "mask_count"])
def test_each_switch_of_the_noise_turns_one_thing_on(switch):
    words = {"timesteps": "block", "timestep_sampling": "stratified", "mask_count": "exact"}
    fields = {"timesteps": "per_block", "timestep_sampling": "stratified", "mask_count": "exact"}
    strategy = build(strategy="bd3lm", **{switch: words[switch]})
    assert strategy.noise_sampling == NoiseSampling(**{fields[switch]: True})
    assert strategy.describe()[switch] == words[switch]
    assert build(strategy="bd3lm").noise_sampling == NoiseSampling()


REFUSED = [
    ({"strategy": "tide-croos"}, MAPPED, "--strategy tide-croos: choose one of bd3lm, ar, joint, calm, tide-cross"),
    ({"chunk_objective": "clam"}, MAPPED, "--chunk-objective clam: choose one of none, calm, reverse_calm"),
    ({"distribution_objective": "kl"}, MAPPED, "--distribution-objective kl: choose one of none, forward_kl"),
    ({"tidal": "blend"}, MAPPED, "--tidal blend: choose one of off, mix, weight"),
    ({"tidal_ramp": "step"}, MAPPED, "--tidal-ramp step: choose one of cosine, linear"),
    ({"tidal_axes": "t"}, MAPPED, "--tidal-axes t: choose one of both, training, timestep"),
    ({"masking": "random"}, MAPPED, "--masking random: choose one of expand, synchronous"),
    ({"compdemo_split": "half"}, MAPPED, "--compdemo-split half: choose one of bernoulli, exact"),
    ({"compdemo_unit": "byte"}, MAPPED, "--compdemo-unit byte: choose one of chunk, token"),
    ({"teacher_context": "past"}, MAPPED, "--teacher-context past: choose one of full, block_causal"),
    ({"teacher_context": "causal", "compdemo": True}, MAPPED, "--compdemo reveals half of the masks, and a teacher"),
    ({"strategy": "kl"}, None, "strategy 'kl' compares distributions and needs the tokens that both"),
    ({"strategy": "calm", "distribution_objective": "forward_kl"}, None, "pass the bridge"),
    ({"strategy": "tide-shared"}, None, "depends on whether the two tokenizers are the same; pass their bridge"),
    ({"strategy": "ar", "chunk_objective": "calm"}, MAPPED, "'ar' masks nothing, so there is nothing to distil"),
    ({"strategy": "tide-cross", "chunk_objective": "none"}, MAPPED, "has no objective left; use strategy bd3lm"),
    ({"strategy": "bd3lm", "tidal": "mix"}, None, "tidal has no effect on strategy 'bd3lm', which uses no teacher"),
    ({"strategy": "bd3lm", "tidal_midrange": True}, None, "tidal_midrange has no effect"),
    ({"strategy": "bd3lm", "compdemo": True}, None, "compdemo has no effect"),
    ({"temperature": 0.0}, MAPPED, "--temperature 0.0: must be between 0.001 and 1000"),
    ({"temperature": float("nan")}, MAPPED, "--temperature nan: must be a finite number"),
    ({"distill_weight": -1.0}, MAPPED, "--distill-weight -1.0: must be at least 0"),
    ({"tidal_peak": 1.2}, MAPPED, r"--tidal-peak 1.2: must be between 0 and 1"),
    ({"tidal_init": -0.1}, MAPPED, r"--tidal-init -0.1: must be between 0 and 1"),
    ({"compdemo": True, "compdemo_ratio": 1.5}, MAPPED, "--compdemo-ratio 1.5: must be between 0 and 1"),
]


@pytest.mark.parametrize(("switches", "bridge", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_does_not_go_together_is_one_line(switches, bridge, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(bridge, **switches)
    assert "\n" not in str(caught.value)


def test_a_bridge_without_a_common_string_is_refused_for_distributions_alone():
    nothing = SimpleNamespace(
        shared=False, shared_prefix=0, student_ids=np.zeros(0, np.int64), teacher_ids=np.zeros(0, np.int64)
    )
    assert build(nothing, strategy="tide-cross").needs_target_logprobs
    with pytest.raises(ValueError, match="share no token"):
        build(nothing, strategy="kl")


@pytest.mark.parametrize(
    ("switches", "bridge", "message"),
    [
        ({"strategy": "tide-cross", "tidal": "mix"}, MAPPED, "mixes the target of reverse_calm, a reversed"),
        ({"strategy": "reverse-kl", "tidal": "mix"}, SHARED, "mixes the target of reverse_kl, a reversed"),
        ({"strategy": "calm", "compdemo": True, "compdemo_unit": "token"}, MAPPED, "reveals half of a chunk"),
    ],
)
def test_doubtful_combinations_warn_once(switches, bridge, message):
    with pytest.warns(UserWarning, match=message) as caught:
        build_strategy(StrategyConfig(**switches), bridge)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bridge", [MAPPED, SHARED], ids=["two vocabularies", "one vocabulary"])
def test_no_name_warns_by_itself(name, bridge):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_strategy(StrategyConfig(strategy=name), bridge)


def test_weighing_or_mixing_where_it_belongs_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_strategy(StrategyConfig(strategy="tide-cross", tidal="weight"), MAPPED)
        build_strategy(StrategyConfig(strategy="calm", tidal="mix"), MAPPED)
        build_strategy(StrategyConfig(strategy="tide-cross", compdemo=True, compdemo_unit="token"), SHARED)


def test_provenance_says_what_was_built():
    said = build(strategy="tide-bridge", compdemo_split="exact").describe()
    assert json.loads(json.dumps(said)) == said
    assert said["strategy"] == "tide-bridge"
    assert (said["chunk_objective"], said["chunk_tidal"]) == ("bernoulli_kl", "weight")
    assert (said["distribution_objective"], said["distribution_tidal"]) == ("forward_kl", "mix")
    assert (said["compdemo"], said["compdemo_split"]) == (True, "exact")
    assert (said["compared_strings"], said["bucket"]) == (7, True)
    assert "temperature" not in build(strategy="bd3lm").describe()
    plain = build(strategy="tide-cross").describe()
    assert "tidal_peak" not in plain
    assert plain["compdemo"] is False
