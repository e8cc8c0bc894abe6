"""The strategies by name, and ``build_strategy``: a name with its switches -> ``Strategy``.

A new strategy is one line in ``STRATEGIES``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_tide.config import StrategyConfig
from megatron_tide.diffusion import ATTENTION_LAYOUTS, MASKINGS, NOISE_SCHEDULES, CompDemo
from megatron_tide.objectives.chunk import CHUNK_OBJECTIVES, ChunkObjective
from megatron_tide.objectives.common import named
from megatron_tide.objectives.distribution import DISTRIBUTION_OBJECTIVES, DistributionObjective, VocabMap
from megatron_tide.objectives.strategy import ChunkTerm, DistributionTerm, Strategy, TidalCurve
from megatron_tide.objectives.tidal import AXES, RAMPS, TIDAL_USES

if TYPE_CHECKING:
    from megatron_tide.bridge import Bridge


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """The parts of one strategy, by name; a flag of the run replaces its part.

    ``chunk_tidal`` and ``distribution_tidal``: what TIDAL does to each objective (``--tidal`` replaces both).
    ``where_vocabularies_differ``: the spec used instead where the two tokenizers differ.
    """

    meaning: str
    chunk: str = "none"
    distribution: str = "none"
    chunk_tidal: str = "off"
    distribution_tidal: str = "off"
    compdemo: bool = False
    where_vocabularies_differ: StrategySpec | None = None


STRATEGIES: dict[str, StrategySpec] = {
    "bd3lm": StrategySpec(meaning="denoising only, no teacher: the baseline"),
    "calm": StrategySpec(meaning="CALM: forward likelihood matching of chunks", chunk="calm"),
    "tide-cross": StrategySpec(meaning="the paper's TIDE-Cross: Reverse CALM", chunk="reverse_calm"),
    "tide-shared": StrategySpec(
        meaning="the paper's TIDE-Shared: TIDAL and CompDemo over forward KL (CALM where the vocabularies differ)",
        distribution="forward_kl",
        distribution_tidal="mix",
        compdemo=True,
        where_vocabularies_differ=StrategySpec(
            meaning="TIDE-Shared over CALM", chunk="calm", chunk_tidal="mix", distribution_tidal="mix", compdemo=True
        ),
    ),
    "kl": StrategySpec(meaning="forward KL(teacher || student) on one-to-one chunks", distribution="forward_kl"),
    "reverse-kl": StrategySpec(
        meaning="reverse KL(student || teacher) on one-to-one chunks", distribution="reverse_kl"
    ),
    "bernoulli-kl": StrategySpec(
        meaning="KL(student || teacher) of the chunk's Bernoulli (ours)", chunk="bernoulli_kl"
    ),
    # TIDAL mixes the forward KL's target, as in TIDE-Shared, and weighs the chunks' reversed objective, which mixing
    # would work against.
    "tide-bridge": StrategySpec(
        meaning="forward KL on one-to-one chunks, Bernoulli KL on the others, with CompDemo and TIDAL (ours)",
        chunk="bernoulli_kl",
        distribution="forward_kl",
        chunk_tidal="weight",
        distribution_tidal="mix",
        compdemo=True,
    ),
}

_CHUNK: dict[str, ChunkObjective | None] = {"none": None, **CHUNK_OBJECTIVES}
_DISTRIBUTION: dict[str, DistributionObjective | None] = {"none": None, **DISTRIBUTION_OBJECTIVES}
_SPLITS = {"bernoulli": False, "exact": True}
_UNITS = {"chunk": False, "token": True}


def build_strategy(config: StrategyConfig, bridge: Bridge | None) -> Strategy:
    """The strategy that ``config`` names, with its switches applied.

    ``bridge`` may be None where the shared vocabulary does not matter: for bd3lm and chunk objectives. ValueError (one
    line) for an unknown word, a number out of range, or parts that do not go together. Warns, once, where TIDAL mixes
    the target of a reversed objective, and where CompDemo would split chunks that are scored whole.
    """
    spec = _spec(config, bridge)
    chunk = named(_CHUNK, _either(config.chunk_objective, spec.chunk), "chunk objective")
    rows = named(_DISTRIBUTION, _either(config.distribution_objective, spec.distribution), "distribution objective")
    chunk_tidal = named(TIDAL_USES, _either(config.tidal, spec.chunk_tidal), "TIDAL use")
    rows_tidal = named(TIDAL_USES, _either(config.tidal, spec.distribution_tidal), "TIDAL use")
    compdemo = spec.compdemo if config.compdemo is None else config.compdemo
    _check_numbers(config)
    if chunk is None and rows is None:
        _check_nothing_distilled(config)
        compdemo = False
    split = CompDemo(
        ratio=config.compdemo_ratio,
        exact=named(_SPLITS, config.compdemo_split, "CompDemo split"),
        by_token=named(_UNITS, config.compdemo_unit, "CompDemo unit"),
    )
    named(ATTENTION_LAYOUTS, config.teacher_context, "teacher context")
    chunk_term = None if chunk is None else ChunkTerm(chunk, chunk_tidal, config.temperature)
    row_term = (
        None if rows is None else DistributionTerm(rows, rows_tidal, config.temperature, _vocabulary(config, bridge))
    )
    _warn(chunk_term, row_term, split if compdemo else None, bridge)
    return Strategy(
        name=config.strategy,
        chunk=chunk_term,
        rows=row_term,
        curve=_curve(config),
        compdemo=split if compdemo else None,
        noise_schedule=named(NOISE_SCHEDULES, config.noise_schedule, "noise schedule"),
        masking=named(MASKINGS, config.masking, "masking"),
        distill_weight=config.distill_weight,
        provenance=_provenance(config, chunk_term, row_term, compdemo),
    )


def _either(switch: str | None, default: str) -> str:
    return default if switch is None else switch


def _spec(config: StrategyConfig, bridge: Bridge | None) -> StrategySpec:
    spec = named(STRATEGIES, config.strategy, "strategy")
    if spec.where_vocabularies_differ is None:
        return spec
    if bridge is None:
        raise ValueError(
            f"strategy {config.strategy!r} depends on whether the two tokenizers are the same; give it their bridge"
        )
    return spec if bridge.shared else spec.where_vocabularies_differ


def _curve(config: StrategyConfig) -> TidalCurve:
    named(RAMPS, config.tidal_ramp, "TIDAL ramp")
    named(AXES, config.tidal_axes, "TIDAL axes")
    return TidalCurve(config.tidal_init, config.tidal_peak, config.tidal_ramp, config.tidal_axes, config.tidal_midrange)


def _check_numbers(config: StrategyConfig) -> None:
    if not config.temperature > 0:
        raise ValueError(f"temperature {config.temperature} is not above 0; the paper's is 2.0")
    if not config.distill_weight >= 0:
        raise ValueError(f"distill_weight {config.distill_weight} is negative; use 0 or more")
    for name, value in (("tidal_init", config.tidal_init), ("tidal_peak", config.tidal_peak)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is outside [0, 1]; the paper goes from 0.1 to 0.9")


def _check_nothing_distilled(config: StrategyConfig) -> None:
    """Without an objective, a switch that would change one is a mistake, and so is a strategy that lost all of its
    own."""
    spec = STRATEGIES[config.strategy]
    if (spec.chunk, spec.distribution) != ("none", "none"):
        raise ValueError(f"strategy {config.strategy!r} is left without an objective; use strategy bd3lm for none")
    idle = {"tidal": config.tidal not in (None, "off"), "tidal_midrange": config.tidal_midrange}
    for switch, is_on in (idle | {"compdemo": bool(config.compdemo)}).items():
        if is_on:
            raise ValueError(
                f"{switch} has no effect on strategy {config.strategy!r}, which uses no teacher; "
                "name an objective or drop it"
            )


def _vocabulary(config: StrategyConfig, bridge: Bridge | None) -> VocabMap:
    if bridge is None:
        raise ValueError(
            f"strategy {config.strategy!r} compares distributions and must know which tokens both vocabularies "
            "hold; give it the bridge, or use a chunk objective alone"
        )
    if bridge.shared:
        return VocabMap.shared_prefix(bridge.shared_prefix)
    return VocabMap(torch.as_tensor(bridge.student_ids), torch.as_tensor(bridge.teacher_ids), bucket=True)


def _warn(
    chunk: ChunkTerm | None, rows: DistributionTerm | None, split: CompDemo | None, bridge: Bridge | None
) -> None:
    for term in (chunk, rows):
        if term is not None and term.tidal.mixes and term.objective.reversed:
            warnings.warn(
                f"TIDAL mixes the target of {term.objective.name}, a reversed objective: the student's share of its "
                "own target works against it late in training; tidal 'weight' changes the strength alone",
                stacklevel=3,
            )
    if chunk is not None and split is not None and split.by_token and bridge is not None and not bridge.shared:
        warnings.warn(
            "compdemo_unit 'token' reveals half of a chunk to the pass that scores the other half, and these "
            "tokenizers differ: chunks of several tokens will look too easy; 'chunk' keeps them whole",
            stacklevel=3,
        )


def _provenance(
    config: StrategyConfig, chunk: ChunkTerm | None, rows: DistributionTerm | None, compdemo: bool
) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "strategy": config.strategy,
        "chunk_objective": chunk.objective.name if chunk else "none",
        "distribution_objective": rows.objective.name if rows else "none",
        "noise_schedule": config.noise_schedule,
        "masking": config.masking,
    }
    if chunk is None and rows is None:
        return plain
    plain |= {
        "temperature": config.temperature,
        "distill_weight": config.distill_weight,
        "teacher_context": config.teacher_context,
        "compdemo": compdemo,
        "tidal_midrange": config.tidal_midrange,
    }
    if compdemo:
        plain |= {key: getattr(config, key) for key in ("compdemo_ratio", "compdemo_split", "compdemo_unit")}
    if chunk is not None:
        plain["chunk_tidal"] = chunk.tidal.name
    if rows is not None:
        plain |= {"distribution_tidal": rows.tidal.name, "compared_strings": rows.vocabulary.strings}
        plain["bucket"] = rows.vocabulary.bucket
    if any(term is not None and term.tidal.name != "off" for term in (chunk, rows)):
        plain |= {key: getattr(config, key) for key in ("tidal_axes", "tidal_ramp", "tidal_init", "tidal_peak")}
    return plain
