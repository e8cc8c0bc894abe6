"""The run as one tree of frozen, keyword-only dataclasses: parse, check, print, fingerprint.

Every flag is one field, with its default (here and nowhere else) and its meaning; the command line, the recorded
``run.json`` and the fingerprint that resuming checks are all made from the fields. A :func:`free_flag` cannot change
the curve (where files go, how often to log), so it may differ when a run is resumed.
The defaults are the paper's settings (TIDE section 4) where the paper states one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.bounds import MOST_STEPS
from megatron_tide.choices import (
    ATTENTION_LAYOUTS,
    CHUNK_OBJECTIVES,
    COMPDEMO_SPLITS,
    COMPDEMO_UNITS,
    DISTRIBUTION_OBJECTIVES,
    DISTRIBUTION_ROWS,
    LR_SCHEDULES,
    MASK_COUNTS,
    MASKINGS,
    METRIC_LOGS,
    NOISE_SCHEDULES,
    OPTIMIZERS,
    OWN_MASKS,
    STRATEGIES,
    TEACHER_HOSTINGS,
    TIDAL_AXES,
    TIDAL_RAMPS,
    TIDAL_USES,
    TIMESTEP_SAMPLINGS,
    TIMESTEPS,
    or_none,
)
from megatron_tide.cli import SEEDS, flag
from megatron_tide.files import read_json
from megatron_tide.presets import PRESETS

BY_STRATEGY = "set by the strategy"
CACHED = "cached"  # the hosting without weights


def free_flag(default: Any, help: str, **more: Any) -> Any:
    """``cli.flag`` of what cannot change the curve."""
    return flag(default, help, affects_loss=False, **more)


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Files."""

    student: str = free_flag("", "Model to train: folder in hub format, or hub name", metavar="DIR")
    teacher: str = free_flag(
        "", "Frozen teacher: folder in hub format, or hub name; only for strategies that distil", metavar="DIR"
    )
    bridge: str = free_flag("", "Folder made by the bridge command; only for strategies that distil", metavar="DIR")
    data: str = free_flag("", "Training data: folder made by the prepare command", metavar="DIR")
    validation: str = free_flag(
        "", "Validation data: folder made by the prepare command, for --eval-every", metavar="DIR"
    )
    out: str = free_flag("", "Folder to write checkpoints, logs and run.json to", metavar="DIR")
    trust_remote_code: bool = free_flag(False, "Run Python code that comes with a model or tokenizer")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Objective, masking and teacher input."""

    strategy: str = flag(
        "tide-cross", "Named strategy; the other flags of this group change its parts", choices=STRATEGIES
    )
    chunk_objective: str | None = flag(
        None,
        f"Objective on the likelihoods of chunks. {CHUNK_OBJECTIVES}",
        choices=or_none(CHUNK_OBJECTIVES),
        shown=BY_STRATEGY,
    )
    distribution_objective: str | None = flag(
        None,
        f"Objective on full vocabulary distributions. {DISTRIBUTION_OBJECTIVES}",
        choices=or_none(DISTRIBUTION_OBJECTIVES),
        shown=BY_STRATEGY,
    )
    distribution_rows: str = flag(
        "pairs", f"Positions at which distributions are compared. {DISTRIBUTION_ROWS}", choices=DISTRIBUTION_ROWS
    )
    temperature: float = flag(2.0, "Temperature T of every distillation objective", low=1e-3, high=1e3)
    distill_weight: float = flag(1.0, "Weight of the distillation loss; the denoising loss has weight 1", low=0)
    teacher_top: int = flag(
        0,
        "Number of the teacher's most likely categories that --distribution-objective compares singly, the others "
        "count as one; 0: all",
        low=0,
    )
    tidal: str | None = flag(
        None, f"Use of TIDAL's lambda(progress, masking rate). {TIDAL_USES}", choices=TIDAL_USES, shown=BY_STRATEGY
    )
    tidal_axes: str = flag("both", f"Variables that lambda depends on. {TIDAL_AXES}", choices=TIDAL_AXES)
    tidal_ramp: str = flag("cosine", "Shape of lambda over training progress", choices=TIDAL_RAMPS)
    tidal_init: float = flag(0.1, "Lambda at the start of training", low=0, high=1)
    tidal_peak: float = flag(0.9, "Lambda at the end of training", low=0, high=1)
    tidal_midrange: bool = flag(
        False, "Weight each timestep by exp(-(r - 0.5)^2 / (2 * 0.15^2)), where r is its masking rate"
    )
    compdemo: bool | None = flag(
        None, "Run two complementary teacher passes, each with half of the masks revealed", shown=BY_STRATEGY
    )
    compdemo_ratio: float = flag(0.5, "Share of the masks in the first half", low=0, high=1)
    compdemo_split: str = flag(
        "bernoulli", f"Method to split the masks into halves. {COMPDEMO_SPLITS}", choices=COMPDEMO_SPLITS
    )
    compdemo_unit: str = flag(
        "chunk", f"Unit that is never split between the halves. {COMPDEMO_UNITS}", choices=COMPDEMO_UNITS
    )
    noise_schedule: str = flag(
        "linear", f"Masking rate as a function of the timestep t. {NOISE_SCHEDULES}", choices=NOISE_SCHEDULES
    )
    timesteps: str = flag("sample", f"Timesteps that are drawn. {TIMESTEPS}", choices=TIMESTEPS)
    timestep_sampling: str = flag(
        "independent", f"Distribution of the timesteps. {TIMESTEP_SAMPLINGS}", choices=TIMESTEP_SAMPLINGS
    )
    mask_count: str = flag("bernoulli", f"Units masked at a timestep. {MASK_COUNTS}", choices=MASK_COUNTS)
    pretraining: str = flag(
        "",
        "Strategies without a teacher to train with first, each for a share of the steps, e.g. ar:0.4,joint:0.4; "
        "--strategy is for the rest",
        metavar="NAME:SHARE,...",
    )
    score_prompt: bool = flag(False, "Score the tokens of prompts too in the next-token loss (strategies ar and joint)")
    block_growth: str = flag(
        "",
        "Block sizes of the student to train with first, each for a share of the steps, e.g. 8:0.5,16:0.25; that of "
        "the data is for the rest",
        metavar="SIZE:SHARE,...",
    )
    masking: str = flag("expand", f"Unit of masking. {MASKINGS}", choices=MASKINGS)
    own_masks: str = flag("random", f"Masks of text that the student wrote. {OWN_MASKS}", choices=OWN_MASKS)
    teacher_context: str = flag(
        "full", f"What each position of the teacher attends to. {ATTENTION_LAYOUTS}", choices=ATTENTION_LAYOUTS
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Teacher placement."""

    teacher_hosting: str | None = free_flag(
        None, f"Location of the teacher's weights. {TEACHER_HOSTINGS}", choices=TEACHER_HOSTINGS, shown="replicated"
    )
    teacher_deepspeed: str = free_flag(
        "",
        "DeepSpeed JSON of the teacher, instead of --teacher-hosting; for examples see ds_configs/teacher_*.json",
        metavar="FILE",
        shown="that of the hosting",
    )
    teacher_cache: str = free_flag(
        "",
        "Folder made by the cache command, with --teacher-hosting cached; --teacher may then be left out",
        metavar="DIR",
    )
    teacher_nvme: str = free_flag(
        "",
        "Folder on a fast local disk for the teacher's weights, with zero3_nvme",
        metavar="DIR",
        shown="the folder in the DeepSpeed JSON",
    )
    skip_teacher_probe: bool = free_flag(
        False, "Skip the check before step 1 that the teacher predicts the data better than chance"
    )
    skip_plan: bool = free_flag(False, "Skip the check that the run fits into the memory of this machine")
    teacher_dtype: str = flag("bf16", "Precision of the teacher's weights", choices=("bf16", "fp32"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization."""

    epochs: float = flag(10.0, "Number of passes over the data, if --max-steps is 0", low=1e-6, high=1e9)
    max_steps: int = flag(0, "Number of optimizer steps; 0: as many as --epochs takes", low=0, high=MOST_STEPS)
    global_batch_size: int = flag(64, "Number of samples per optimizer step, over all ranks", low=1, high=1 << 30)
    micro_batch_size: int = free_flag(
        4,
        "Number of samples per forward pass on one rank; changes memory and speed, never the curve",
        low=1,
        high=1 << 20,
    )
    optimizer: str = flag("adamw", f"Optimizer of the student. {OPTIMIZERS}", choices=OPTIMIZERS)
    lr: float = flag(5e-5, "Peak learning rate", low=0, high=1)
    muon_lr: float = flag(
        0.02,
        "Peak learning rate of Muon (--lr is that of the other parameters): a step changes a weight [A, B] by a nearly "
        "orthogonal matrix times sqrt(max(1, A / B)) and this",
        low=0,
        high=1,
    )
    muon_momentum: float = flag(0.95, "Momentum of Muon (Nesterov's)", low=0, high=1)
    warmup_ratio: float = flag(0.1, "Share of the steps used for linear warmup", low=0, high=1)
    lr_schedule: str = flag(
        "cosine", f"Decay of the learning rates to their final values. {LR_SCHEDULES}", choices=LR_SCHEDULES
    )
    lr_decay_share: float = flag(
        1.0,
        "Share of the steps, the last ones, over which learning rates decay; between warmup and decay they stay at the "
        "peak; 1: all steps after the warmup",
        low=0,
        high=1,
    )
    min_lr_ratio: float = flag(0.0, "Final learning rate, as a share of the peak", low=0, high=1)
    weight_decay: float = flag(0.0, "Weight decay of AdamW and Muon, applied to matrices only", low=0, high=1)
    beta1: float = flag(0.9, "Beta 1 of AdamW", low=0, high=1)
    beta2: float = flag(0.999, "Beta 2 of AdamW", low=0, high=1)
    adam_eps: float = flag(1e-8, "Epsilon of AdamW", low=0, high=1)
    max_grad_norm: float = flag(
        1.0, "Maximum global norm of the gradient; larger gradients are clipped; 0: no clipping", low=0
    )
    precision: str = flag(
        "bf16", "Precision of the student's forward and backward; master weights are fp32", choices=("bf16", "fp32")
    )
    activation_checkpointing: bool = free_flag(
        False, "Recompute the student's layers in the backward pass: less memory, a third more compute"
    )
    compile_layers: bool | None = free_flag(
        None,
        "Compile the student's decoder layers (torch.compile): faster on a GPU, after a minute of compilation",
        shown="on with a GPU",
    )
    seed: int = flag(42, "Random seed for the data order and the noise", **SEEDS)
    deepspeed: str = free_flag(
        "ds_configs/zero1.json", "DeepSpeed JSON of the student: ZeRO stage, offload, communication", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints and logs."""

    save_every: int = free_flag(500, "Number of steps between checkpoints; the last step is always saved", low=1)
    keep_last: int = free_flag(2, "Number of checkpoints to keep", low=1)
    resume: str = free_flag(
        "auto",
        "Checkpoint to resume from. auto: the newest complete one in --out, else start; never: start, and refuse an "
        "--out with checkpoints; or the folder of a checkpoint",
        metavar="auto|never|DIR",
    )
    continue_from: str = free_flag(
        "",
        "Run (its newest checkpoint) or checkpoint to continue, with its weights, optimizer state, step and schedule; "
        "flags, models and bridge must be the same, --data may differ",
        metavar="DIR",
    )
    until_step: int = free_flag(
        0,
        "Step to end at, before --max-steps; schedules still run to --max-steps, and --continue-from goes on from here",
        shown="the last",
        low=0,
        high=10**12,
    )
    log_every: int = free_flag(10, "Number of steps between log lines and TensorBoard points", low=1)
    log_to: str = free_flag(
        "tensorboard", f"Where metrics go beside metrics.jsonl in --out. {METRIC_LOGS}", choices=METRIC_LOGS
    )
    eval_every: int = free_flag(0, "Number of steps between evaluations on --validation; 0: never", low=0)
    eval_samples: int = free_flag(256, "Number of --validation samples per evaluation", low=1)
    hang_timeout: float = free_flag(
        900.0, "Seconds without progress of a rank after which the run ends with an error that names the rank", low=0
    )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One run, in groups of flags; a flag's name is unique over all groups."""

    paths: PathsConfig = field(default_factory=PathsConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def loss_flags(self) -> dict[str, Any]:
        """The flags that affect the loss, flat: what a resumed run must agree on."""
        return {info.name: value for info, value in cli.values_of(self) if info.metadata.get("affects_loss", True)}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.loss_flags(), sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Refuse a run without a required path.

        Raises:
            ValueError: one line naming the flags.
        """
        distils = STRATEGIES[self.strategy.strategy].distils
        teacher = [] if self.teacher.teacher_hosting == CACHED else ["teacher"]
        needed = ["student", "data", "out", *([*teacher, "bridge"] if distils else [])]
        missing = [name for name in needed if not getattr(self.paths, name)]
        if missing:
            raise ValueError(
                f"missing --{', --'.join(missing)} (--strategy {self.strategy.strategy} needs them; see --help)"
            )
        if self.save.eval_every and not self.paths.validation:
            raise ValueError("--eval-every needs --validation: a folder made by `python -m megatron_tide prepare`")


def from_flat(values: Mapping[str, Any], origin: str = "configuration") -> DistillConfig:
    """``cli.build`` of the tree: ``{flag: value}``, flat."""
    config: DistillConfig = cli.build(DistillConfig, values, origin)
    return config


@dataclass(frozen=True, kw_only=True)
class DistillArgs:
    """Arguments of the distill command: the run, and where its flags come from."""

    preset: str = flag("paper", f"Named set of flags. {PRESETS}", choices=tuple(PRESETS))
    config: str = flag(
        "", "JSON file of flags, or another run's run.json; flags on the command line override it", metavar="FILE"
    )
    dry_run: bool = flag(False, "Check the run (files, fingerprints, sizes), print its configuration, and exit")
    local_rank: int | None = flag(None, "Set by the deepspeed launcher", kind="hidden", low=-1)
    run: DistillConfig = field(default_factory=DistillConfig)


def preset_and_file(given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults from ``--preset``, overridden by ``--config FILE``, as ``given`` on the command line."""
    from_file = read_config_file(given["config"]) if given.get("config") else {}
    if from_file.get("trust_remote_code") and "trust_remote_code" not in given:  # a file of someone else's is not trust
        options = "add --trust-remote-code if you trust the code of its models, else --no-trust-remote-code"
        raise ValueError(f"--config {given['config']}: has trust_remote_code; {options}")
    run = {"strategy": StrategyConfig().strategy, "bridge": "", **from_file, **given}
    preset = PRESETS[given.get("preset", "paper")].flags(run["strategy"], run["bridge"])
    if run.get("global_batch_size", 0) % preset.get("micro_batch_size", 1):
        del preset["micro_batch_size"]  # a cut of the preset's own batch, which does not fit this one
    unlike = [name for name in preset if from_file.get(name) != preset[name]]
    if "preset" in given and unlike and preset.keys() <= from_file.keys():
        raise ValueError(
            f"--preset {given['preset']} changes nothing: --config {given['config']} states all of its flags, such as "
            f"{unlike[0]} = {from_file[unlike[0]]!r}; leave one of the two out"
        )
    return {**preset, **from_file}


def read_config_file(path: str) -> dict[str, Any]:
    """Flags of a JSON file, checked: flat ``{flag: value}``, by group, or a recorded ``run.json``."""
    try:
        content = read_json(Path(path))
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    content = content["config"] if isinstance(content.get("config"), dict) else content
    groups = {info.name for info in dataclasses.fields(DistillConfig)}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if key in groups and isinstance(value, dict) else {key: value})
    from_flat(flat, path)
    return flat
