"""Read and cross-check a run's inputs: configuration, data, tokenizers, bridge. Imports no model code: fast dry runs.

Every error is raised before the first step, on all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tide import __version__
from megatron_tide.bounds import MOST_STEPS
from megatron_tide.bridge import Bridge, TextTokenizer, load_tokenizer
from megatron_tide.choices import METRIC_LOGS, OPTIMIZERS
from megatron_tide.config import CACHED, DistillConfig
from megatron_tide.data import DistributedBatchSampler, PreparedData
from megatron_tide.diffusion import ATTENTION_LAYOUTS, mask_of
from megatron_tide.ds_config import SUMS
from megatron_tide.files import fingerprint, read_json
from megatron_tide.hosting.build import hosting_of
from megatron_tide.hosting.cached import OutputCache, cache_settings
from megatron_tide.objectives import Strategy, build_strategy
from megatron_tide.presets import PRESETS
from megatron_tide.train.engine import engine_settings
from megatron_tide.train.phases import Phases, build_phases
from megatron_tide.training_checkpoint import CHECKSUMS, STATE, read_description, step_folder


@dataclass(frozen=True)
class RunInputs:
    """A run's inputs, checked against each other; no weights are loaded yet. ``strategy``: that of the last phase;
    ``total_steps``: of the schedule; ``steps``: of it, those of this run; ``cache``: the teacher's outputs, if they are
    on disk; ``note``: which flags change nothing."""

    data: PreparedData
    validation: PreparedData | None
    strategy: Strategy
    phases: Phases
    sampler: DistributedBatchSampler
    total_steps: int
    steps: range
    run: dict[str, Any]
    note: str = ""
    cache: OutputCache | None = None

    @property
    def with_teacher(self) -> range:
        """The steps of this run that may ask the teacher."""
        return range(max(self.steps.start, self.phases.last.start), self.steps.stop)


def read_run_inputs(config: DistillConfig, world_size: int) -> RunInputs:
    """Open data, tokenizers and bridge, and check that they match.

    Raises:
        ValueError: one line: which artifact differs from which, and the fix.
    """
    paths = config.paths
    engine_settings(config, world_size)
    hosting_of(config.teacher, world_size)
    METRIC_LOGS[config.save.log_to].check()
    data = PreparedData.open(paths.data)
    student = load_tokenizer(paths.student, trust_remote_code=paths.trust_remote_code)
    bridge, teacher = _bridge_and_teacher(config, student) if paths.bridge else (None, None)
    validation = PreparedData.open(paths.validation) if paths.validation else None
    for prepared in [data] if validation is None else [data, validation]:
        _check_origin(prepared, bridge, student, teacher)
        mask_of(prepared, "student", ATTENTION_LAYOUTS["staircase"])
    strategy = build_strategy(config.strategy, bridge)
    _check_needs(config, strategy, data)
    sampler = DistributedBatchSampler(
        data.stats, config.train.global_batch_size, config.train.micro_batch_size, world_size, config.train.seed
    )
    total = config.train.max_steps or math.ceil(config.train.epochs * sampler.steps_per_epoch)
    if total > MOST_STEPS:
        raise ValueError(f"--epochs {config.train.epochs:g}: {total} steps; the most are {MOST_STEPS}, use --max-steps")
    phases = build_phases(config.strategy, strategy, total, data.manifest["student"]["block"])
    _refuse_nothing_to_learn(config, data, phases)
    steps, begun = _part(config, total)
    found = RunInputs(
        data=data,
        validation=validation,
        strategy=strategy,
        phases=phases,
        sampler=sampler,
        total_steps=total,
        steps=steps,
        run={},
        note=_unused(config, strategy),
    )
    found = replace(found, run=_record(config, found, bridge, world_size) | {"continued": begun})
    cached = config.teacher.teacher_hosting == CACHED and strategy.needs_teacher
    return replace(found, cache=_cache(config, found)) if cached else found


def _unused(config: DistillConfig, strategy: Strategy) -> str:
    """In words, flags that were set and change nothing, because what they are a part of is not used."""
    defaults, usual = DistillConfig(), [PRESETS[name].always for name in PRESETS]
    parts = ["teacher_context", "temperature", "distill_weight", "teacher_top"]
    parts += [f"tidal_{name}" for name in ("axes", "ramp", "init", "peak")]
    parts += [f"compdemo_{name}" for name in ("ratio", "split", "unit")]
    idle: list[tuple[Any, Any, str]] = [
        (config.strategy, defaults.strategy, name) for name in parts if name not in strategy.describe()
    ]
    if not hasattr(OPTIMIZERS[config.train.optimizer], "momentum"):
        idle += [(config.train, defaults.train, name) for name in ("muon_lr", "muon_momentum")]
    if config.train.max_steps:
        idle.append((config.train, defaults.train, "epochs"))
    if not config.save.eval_every:
        idle += [(config.paths, defaults.paths, "validation"), (config.save, defaults.save, "eval_samples")]
    changed = [
        f"--{name.replace('_', '-')}"
        for group, default, name in idle
        if getattr(group, name) not in (getattr(default, name), *(one.get(name) for one in usual))
    ]
    return f"note: {', '.join(changed)}: nothing in this run uses that" if changed else ""


def _check_needs(config: DistillConfig, strategy: Strategy, data: PreparedData) -> None:
    """ValueError where the strategy needs what flags or data do not give."""
    paths = config.paths
    if strategy.noise_sampling.own_order and not data.ordered:
        raise ValueError(
            f"--own-masks {config.strategy.own_masks}: {paths.data} does not say in which order the student wrote; "
            "prepare rows of rollout --as-written"
        )
    if not strategy.needs_teacher:
        return
    if not (paths.bridge and (paths.teacher or config.teacher.teacher_hosting == CACHED)):
        raise ValueError(f"--strategy {config.strategy.strategy} needs a teacher: give --teacher and --bridge")
    mask_of(data, "teacher", ATTENTION_LAYOUTS[config.strategy.teacher_context])


def _refuse_nothing_to_learn(config: DistillConfig, data: PreparedData, phases: Phases) -> None:
    """ValueError where a phase has no teacher, and the student wrote every response: it has no loss."""
    own = data.own(data.stats.keys)
    alone = next((phase.strategy.name for phase in phases.phases if not phase.strategy.needs_teacher), None)
    if alone is not None and own is not None and own.all():
        raise ValueError(
            f"{config.paths.data}: the student wrote every response, and strategy {alone} asks no teacher about them; "
            "use a strategy that distils, or a smaller share of its own text"
        )


def _record(config: DistillConfig, inputs: RunInputs, bridge: Bridge | None, world_size: int) -> dict[str, Any]:
    """What run.json and every checkpoint say of the run."""
    student, paths = config.paths.student, config.paths
    named = [paths.student, paths.teacher, paths.data, paths.validation]
    return {
        "version": __version__,
        "config": config.to_dict(),
        "fingerprint": config.fingerprint,
        "sums": {key: value for key, value in engine_settings(config, world_size).items() if key in SUMS},
        "affects_loss": config.loss_flags(),
        "strategy": inputs.strategy.describe(),
        "phases": inputs.phases.describe(),
        "bridge_fingerprint": bridge.fingerprint if bridge else None,
        "data_fingerprint": inputs.data.fingerprint,
        "data": inputs.data.manifest,
        "model_folder": str(Path(student).resolve()) if Path(student).exists() else student,
        "local_paths": [path for path in named if path and Path(path).exists()],  # others are names of the hub
        "total_steps": inputs.total_steps,
        "until_step": inputs.steps.stop,
    }


def _part(config: DistillConfig, total: int) -> tuple[range, dict[str, Any] | None]:
    """The steps of this run, and with ``--continue-from`` the step and the weights that it goes on from.

    Raises:
        ValueError: that run has not finished its own part, or there is no step left.
    """
    begun, path = None, Path(config.save.continue_from)
    if config.save.continue_from:
        folder = step_folder(path)
        described = read_description(folder)
        step, until = described["state"]["step"], described["run"].get("until_step", described["state"]["total_steps"])
        if folder != path and step != until:
            raise ValueError(
                f"--continue-from {path}: that run is at step {step} of {until}; run its own command first"
            )
        sums = read_json(folder / CHECKSUMS, form={str: str})
        begun = {"step": step, "fingerprint": fingerprint({name: sums[name] for name in sums if name != STATE})}
    steps = range(begun["step"] if begun else 0, config.save.until_step or total)
    if not steps or steps.stop > total:
        raise ValueError(
            f"--until-step {steps.stop}: this run goes on from step {steps.start} of {total}; use a later one"
        )
    return steps, begun


def _cache(config: DistillConfig, inputs: RunInputs) -> OutputCache:
    """The outputs in ``--teacher-cache``; ValueError by name if they are not those of this run's inputs."""
    cache, run, asked = OutputCache.open(config.teacher.teacher_cache), inputs.run, inputs.with_teacher
    data, bridge = run["data_fingerprint"], run["bridge_fingerprint"]
    wanted = cache_settings(config, inputs.strategy, data, bridge, inputs.total_steps)
    cache.refuse_other(wanted, config.train.seed, asked.start, asked.stop)
    run["config"]["paths"]["teacher"] = config.paths.teacher or cache.manifest["teacher_name"]
    return cache


def _bridge_and_teacher(config: DistillConfig, student: TextTokenizer) -> tuple[Bridge, TextTokenizer | None]:
    # Which ids mask, end and pad was settled when data and bridge were made, and is read from them.
    bridge = Bridge.load(config.paths.bridge)
    if not config.paths.teacher:  # its outputs are on disk, with the fingerprints of bridge and data
        return bridge, None
    teacher = load_tokenizer(config.paths.teacher, trust_remote_code=config.paths.trust_remote_code)
    bridge.check_vocabularies(student, teacher)
    return bridge, teacher


def _check_origin(
    data: PreparedData, bridge: Bridge | None, student: TextTokenizer, teacher: TextTokenizer | None
) -> None:
    """Refuse data of other tokenizers, templates or bridge; without a bridge, the teacher's are not compared."""
    if bridge is None:
        prepared = (data.manifest["teacher"] or {}).get("fingerprint")
        data.check(student=student.fingerprint, teacher=prepared, bridge=data.manifest["bridge"])
    else:
        prepared = bridge.manifest["teacher"]["fingerprint"]
        data.check(student=student.fingerprint, teacher=prepared, bridge=bridge.fingerprint)
    data.check_template("student", student.template_fingerprint)
    if teacher is not None:
        data.check_template("teacher", teacher.template_fingerprint)
