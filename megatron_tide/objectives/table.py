"""``build_strategy``: the name of a strategy (``choices.STRATEGIES``) with its flags -> ``Strategy``."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_tide import cli
from megatron_tide.choices import (
    ATTENTION_LAYOUTS,
    CHUNK_OBJECTIVES,
    COMPDEMO_SPLITS,
    COMPDEMO_UNITS,
    DISTRIBUTION_OBJECTIVES,
    DISTRIBUTION_ROWS,
    MASK_COUNTS,
    MASKINGS,
    NOISE_SCHEDULES,
    OWN_MASKS,
    STRATEGIES,
    TIDAL_USES,
    TIMESTEP_SAMPLINGS,
    TIMESTEPS,
    StrategySpec,
    or_none,
)
from megatron_tide.config import StrategyConfig
from megatron_tide.diffusion import CompDemo, NoiseSampling, StudentLayout, predicts_next
from megatron_tide.objectives.distribution import PrefixMap, VocabMap
from megatron_tide.objectives.strategy import ChunkTerm, DistributionTerm, Strategy, TidalCurve

if TYPE_CHECKING:
    from megatron_tide.bridge import Bridge


_NOISE = ("noise_schedule", "timesteps", "timestep_sampling", "mask_count", "masking")


def build_strategy(config: StrategyConfig, bridge: Bridge | None) -> Strategy:
    """The strategy that ``config`` names, with its flags applied.

    ``bridge`` may be None if the shared vocabulary does not matter: for bd3lm and chunk objectives. ValueError (one
    line) for an unknown name, a number out of range, or incompatible parts. Warns if TIDAL mixes the target of a
    reversed objective, and if CompDemo would split chunks that are scored as a unit.
    """
    cli.check(config)
    spec = _spec(config, bridge)
    chunk = or_none(CHUNK_OBJECTIVES)[_either(config.chunk_objective, spec.chunk)]
    rows = or_none(DISTRIBUTION_OBJECTIVES)[_either(config.distribution_objective, spec.distribution)]
    chunk_tidal = TIDAL_USES[_either(config.tidal, spec.chunk_tidal)]
    rows_tidal = TIDAL_USES[_either(config.tidal, spec.distribution_tidal)]
    compdemo = _compdemo(config, spec)
    if chunk is None and rows is None:
        _check_nothing_distilled(config)
        compdemo = None
    elif not spec.denoise:
        raise ValueError(
            f"strategy {config.strategy!r} masks nothing, so there is nothing to distil; remove the objective"
        )
    chunk_term = row_term = None
    if chunk is not None:
        chunk_term = ChunkTerm(chunk, chunk_tidal, config.temperature)
    if rows is not None:
        vocabulary = _vocabulary(config, bridge)
        row_term = DistributionTerm(rows, rows_tidal, config.temperature, vocabulary, config.teacher_top)
    _warn(chunk_term, row_term, compdemo, bridge)
    return Strategy(
        name=config.strategy,
        student=StudentLayout(
            denoise=spec.denoise, next_token=spec.next_token, score_prompt=spec.next_token and config.score_prompt
        ),
        chunk=chunk_term,
        rows=row_term,
        first_rows=_first_rows(config, row_term, bridge),
        curve=TidalCurve(
            config.tidal_init, config.tidal_peak, config.tidal_ramp, config.tidal_axes, config.tidal_midrange
        ),
        compdemo=compdemo,
        noise_schedule=NOISE_SCHEDULES[config.noise_schedule],
        noise_sampling=NoiseSampling(
            per_block=TIMESTEPS[config.timesteps],
            stratified=TIMESTEP_SAMPLINGS[config.timestep_sampling],
            exact=MASK_COUNTS[config.mask_count],
            own_order=_own_order(config),
        ),
        masking=MASKINGS[config.masking],
        distill_weight=config.distill_weight,
        provenance=_provenance(config, chunk_term, row_term, compdemo is not None),
    )


def _either(switch: str | None, default: str) -> str:
    return default if switch is None else switch


def _spec(config: StrategyConfig, bridge: Bridge | None) -> StrategySpec:
    spec = STRATEGIES[config.strategy]
    if spec.where_vocabularies_differ is None:
        return spec
    if bridge is None:
        raise ValueError(
            f"strategy {config.strategy!r} depends on whether the two tokenizers are the same; pass their bridge"
        )
    return spec if bridge.shared else spec.where_vocabularies_differ


def _compdemo(config: StrategyConfig, spec: StrategySpec) -> CompDemo | None:
    wanted = spec.compdemo if config.compdemo is None else config.compdemo
    if not predicts_next(ATTENTION_LAYOUTS[config.teacher_context]):
        split, unit = COMPDEMO_SPLITS[config.compdemo_split], COMPDEMO_UNITS[config.compdemo_unit]
        return CompDemo(ratio=config.compdemo_ratio, exact=split, by_token=unit) if wanted else None
    if config.compdemo:
        raise ValueError(
            f"--compdemo reveals half of the masks, and a teacher with --teacher-context {config.teacher_context} sees "
            "none; leave out one of the two"
        )
    return None


def _own_order(config: StrategyConfig) -> bool:
    in_order: bool = OWN_MASKS[config.own_masks]
    if in_order and not TIMESTEPS[config.timesteps]:
        raise ValueError(f"--own-masks {config.own_masks} is a state of each block: add --timesteps block")
    return in_order


def _check_nothing_distilled(config: StrategyConfig) -> None:
    """Without an objective, a flag that would change one is a mistake, and so is a strategy with all its objectives
    removed."""
    spec = STRATEGIES[config.strategy]
    if spec.distils:
        raise ValueError(f"strategy {config.strategy!r} has no objective left; use strategy bd3lm for none")
    idle = {"tidal": config.tidal not in (None, "off"), "tidal_midrange": config.tidal_midrange}
    for switch, is_on in (idle | {"compdemo": bool(config.compdemo)}).items():
        if is_on:
            raise ValueError(
                f"{switch} has no effect on strategy {config.strategy!r}, which uses no teacher; "
                "set an objective or remove the flag"
            )


def _first_rows(
    config: StrategyConfig, rows: DistributionTerm | None, bridge: Bridge | None
) -> DistributionTerm | None:
    """The term of the first rows of chunks of several tokens; None if only one-to-one chunks are compared."""
    if not DISTRIBUTION_ROWS[config.distribution_rows]:
        return None
    what = f"--distribution-rows {config.distribution_rows}"
    if rows is None:
        raise ValueError(f"{what}: strategy {config.strategy!r} compares no distributions; use tide-bridge or kl")
    if config.teacher_top:
        raise ValueError(f"{what}: --teacher-top counts the categories of one-to-one chunks; leave out one of the two")
    if bridge is None or bridge.prefix_ids is None:
        raise ValueError(f"{what}: the bridge has no byte prefixes; build it again with --fresh (prepared data stay)")
    prefixes = PrefixMap(torch.as_tensor(bridge.prefix_ids), torch.as_tensor(bridge.teacher_ids))
    return replace(rows, vocabulary=prefixes)


def _vocabulary(config: StrategyConfig, bridge: Bridge | None) -> VocabMap:
    if bridge is None:
        raise ValueError(
            f"strategy {config.strategy!r} compares distributions and needs the tokens that both vocabularies "
            "have; pass the bridge, or use only a chunk objective"
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
                "own target works against it late in training; tidal 'weight' changes only the strength",
                stacklevel=3,
            )
    if chunk is not None and split is not None and split.by_token and bridge is not None and not bridge.shared:
        warnings.warn(
            "compdemo_unit 'token' reveals half of a chunk to the pass that scores the other half, and these "
            "tokenizers differ: chunks of several tokens will look too easy; 'chunk' does not split them",
            stacklevel=3,
        )


def _provenance(
    config: StrategyConfig, chunk: ChunkTerm | None, rows: DistributionTerm | None, compdemo: bool
) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "strategy": config.strategy,
        "chunk_objective": chunk.objective.name if chunk else "none",
        "distribution_objective": rows.objective.name if rows else "none",
        **{key: getattr(config, key) for key in _NOISE},
    }
    plain |= {"own_masks": config.own_masks} if OWN_MASKS[config.own_masks] else {}
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
        plain["distribution_rows"] = config.distribution_rows
        plain |= {"teacher_top": rows.top} if rows.top else {}
    if any(term is not None and term.tidal.name != "off" for term in (chunk, rows)):
        plain |= {key: getattr(config, key) for key in ("tidal_axes", "tidal_ramp", "tidal_init", "tidal_peak")}
    return plain
