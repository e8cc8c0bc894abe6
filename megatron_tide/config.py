"""The run as one tree of frozen, keyword-only dataclasses: parse, check, print, fingerprint.

Every knob is one field, with its default (here and nowhere else) and its meaning; the command line, the recorded
``run.json`` and the fingerprint that resuming checks are all made from the fields. ``decides=False`` marks a knob that
cannot change the curve (where files go, how often to log), so it may differ when a run is resumed.
The defaults are the paper's settings (TIDE section 4) where the paper states one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tide.files import read_json
from megatron_tide.presets import PRESETS


def flag(default: Any, meaning: str, *, choices: tuple[str, ...] | None = None, affects_loss: bool = True) -> Any:
    """A dataclass field that is also a command-line flag: its default, its meaning, its valid words."""
    return field(default=default, metadata={"help": meaning, "choices": choices, "decides": affects_loss})


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """What the run reads and where it writes."""

    student: str = flag("", "folder (or hub name) of the model to train, in hub format")
    teacher: str = flag(
        "", "folder (or hub name) of the frozen teacher; not needed for --strategy bd3lm", affects_loss=False
    )
    bridge: str = flag("", "folder made by `python -m megatron_tide.bridge`; not needed for bd3lm", affects_loss=False)
    data: str = flag("", "folder made by `python -m megatron_tide.data.prepare`", affects_loss=False)
    validation: str = flag("", "prepared folder to measure every --eval-every steps", affects_loss=False)
    out: str = flag("", "run folder: checkpoints, logs, run.json", affects_loss=False)
    trust_remote_code: bool = flag(
        False, "run Python code that comes with a model or tokenizer folder", affects_loss=False
    )


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Which objective listens to the teacher, how strongly, what the teacher sees; None = what the strategy says."""

    strategy: str = flag(
        "tide-cross",
        "the paper's name; the switches below override its parts",
        choices=("bd3lm", "calm", "tide-cross", "tide-shared", "kl", "reverse-kl", "bernoulli-kl", "tide-bridge"),
    )
    chunk_objective: str | None = flag(
        None, "on chunk likelihoods", choices=("none", "calm", "reverse_calm", "bernoulli_kl")
    )
    distribution_objective: str | None = flag(
        None,
        "on whole distributions, where the tokenizers agree one to one",
        choices=("none", "forward_kl", "reverse_kl"),
    )
    temperature: float = flag(2.0, "T of every distillation objective")
    distill_weight: float = flag(1.0, "weight of the distillation loss beside the denoising loss")
    tidal: str | None = flag(
        None, "TIDAL: mix the target, or weight the loss, by lambda(progress, t)", choices=("off", "mix", "weight")
    )
    tidal_axes: str = flag("both", "what lambda follows", choices=("both", "training", "timestep"))
    tidal_ramp: str = flag("cosine", "lambda over training progress", choices=("cosine", "linear"))
    tidal_init: float = flag(0.1, "lambda at the start of training")
    tidal_peak: float = flag(0.9, "lambda at the end of training")
    tidal_midrange: bool = flag(False, "weigh samples by exp(-(t - 0.5)^2 / (2 * 0.15^2))")
    compdemo: bool | None = flag(None, "two complementary teacher passes, each with half of the masks revealed")
    compdemo_ratio: float = flag(0.5, "share of the masks in the first half")
    compdemo_split: str = flag("bernoulli", "how the halves are drawn", choices=("bernoulli", "exact"))
    compdemo_unit: str = flag("chunk", "what is dealt to the halves", choices=("chunk", "token"))
    masking: str = flag(
        "expand",
        "expand: draw tokens, then mask their whole chunks (published); synchronous: draw chunks",
        choices=("expand", "synchronous"),
    )
    teacher_context: str = flag(
        "full", "what the teacher attends to (published: full)", choices=("full", "block_causal", "staircase")
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the teacher lives."""

    teacher_hosting: str = flag(
        "replicated",
        "replicated: complete on every rank; zero3: a share on each, gathered by layer; pipeline: some layers on each",
        choices=("replicated", "zero3", "pipeline"),
        affects_loss=False,
    )
    teacher_deepspeed: str = flag(
        "",
        "DeepSpeed JSON of that hosting: ds_configs/teacher_*.json say where a share lies (GPU, host, disk), how many "
        "stages; empty: the hosting's plainest",
        affects_loss=False,
    )
    teacher_nvme: str = flag(
        "", "folder on a fast local disk, for teacher_zero3_nvme.json; empty: what the file says", affects_loss=False
    )
    skip_teacher_probe: bool = flag(
        False, "do not check before step 1 that the teacher knows the data better than chance", affects_loss=False
    )
    skip_plan: bool = flag(
        False,
        "start even where the plan (tools/plan.py) says that the run does not fit this machine",
        affects_loss=False,
    )
    teacher_dtype: str = flag("bf16", "precision of the teacher's weights", choices=("bf16", "fp32"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    epochs: float = flag(10.0, "passes over the data (ignored when --max-steps is given)")
    max_steps: int = flag(0, "optimizer steps; 0 = as many as --epochs makes")
    global_batch_size: int = flag(64, "samples per optimizer step, over all ranks")
    micro_batch_size: int = flag(
        4, "samples per forward on one rank; changes memory and speed, never the curve", affects_loss=False
    )
    lr: float = flag(5e-5, "peak learning rate")
    warmup_ratio: float = flag(0.1, "share of the steps that warm up linearly")
    min_lr_ratio: float = flag(0.0, "the cosine ends at this share of --lr")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    beta1: float = flag(0.9, "AdamW's")
    beta2: float = flag(0.999, "AdamW's")
    adam_eps: float = flag(1e-8, "AdamW's")
    max_grad_norm: float = flag(1.0, "clip the gradient's global norm; 0 = never")
    precision: str = flag(
        "bf16", "of the student's forward and backward; master weights are always fp32", choices=("bf16", "fp32")
    )
    activation_checkpointing: bool = flag(
        False, "recompute the student's layers in backward: less memory, a third more work", affects_loss=False
    )
    seed: int = flag(42, "of the data order and of the noise")
    deepspeed: str = flag(
        "ds_configs/zero1.json", "DeepSpeed JSON of the student: ZeRO stage, offload, communication", affects_loss=False
    )


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints, logs, resuming, giving up."""

    save_every: int = flag(500, "steps between checkpoints; the last step is always saved", affects_loss=False)
    keep_last: int = flag(2, "how many checkpoints stay", affects_loss=False)
    resume: str = flag(
        "auto",
        "auto: go on from the newest whole checkpoint in --out, or start; never: refuse a used --out; "
        "or a checkpoint folder",
        affects_loss=False,
    )
    log_every: int = flag(10, "steps between log lines and TensorBoard points", affects_loss=False)
    eval_every: int = flag(0, "steps between measurements on --validation; 0 = never", affects_loss=False)
    eval_samples: int = flag(256, "samples of --validation that are measured", affects_loss=False)
    hang_timeout: float = flag(
        900.0, "a rank that does not move for so long ends the run, which names it", affects_loss=False
    )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One run. Sections group the knobs; every knob's name is unique, so its flag is ``--name-with-dashes``."""

    paths: PathsConfig = field(default_factory=PathsConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def loss_flags(self) -> dict[str, Any]:
        """The knobs that decide the curve, flat: what a resumed run must agree on."""
        return {name: value for name, (info, value) in _flat(self).items() if info.metadata["decides"]}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.loss_flags(), sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: one line naming the flag and the fix.
        """
        for name, (info, value) in _flat(self).items():
            choices = info.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"--{_dash(name)} {value}: choose one of {', '.join(choices)}")
        missing = [flag for flag in ("student", "data", "out") if not getattr(self.paths, flag)]
        if self.strategy.strategy != "bd3lm":
            missing += [flag for flag in ("teacher", "bridge") if not getattr(self.paths, flag)]
        if missing:
            raise ValueError(
                f"missing --{', --'.join(missing)} (--strategy {self.strategy.strategy} needs them; see --help)"
            )
        if self.save.eval_every and not self.paths.validation:
            raise ValueError("--eval-every needs --validation: a folder made by `python -m megatron_tide.data.prepare`")
        for name, low, high in _RANGES:
            value = _flat(self)[name][1]
            if not low <= value <= high:
                raise ValueError(f"--{_dash(name)} {value}: must lie between {low:g} and {high:g}")


_INF = float("inf")
_RANGES = (
    ("temperature", 1e-3, 1e3),
    ("distill_weight", 0, _INF),
    ("tidal_init", 0, 1),
    ("tidal_peak", 0, 1),
    ("compdemo_ratio", 0, 1),
    ("epochs", 1e-6, _INF),
    ("max_steps", 0, _INF),
    ("global_batch_size", 1, _INF),
    ("micro_batch_size", 1, _INF),
    ("lr", 0, 1),
    ("warmup_ratio", 0, 1),
    ("min_lr_ratio", 0, 1),
    ("weight_decay", 0, 1),
    ("beta1", 0, 1),
    ("beta2", 0, 1),
    ("max_grad_norm", 0, _INF),
    ("save_every", 1, _INF),
    ("keep_last", 1, _INF),
    ("log_every", 1, _INF),
    ("eval_every", 0, _INF),
    ("eval_samples", 1, _INF),
    ("seed", 0, 2**31),
)


def _dash(name: str) -> str:
    return name.replace("_", "-")


def _sections(config_type: type) -> Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(config_type)
    for info in dataclasses.fields(config_type):
        yield info.name, hints[info.name]


def _flat(config: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    return {
        info.name: (info, getattr(getattr(config, section), info.name))
        for section, section_type in _sections(type(config))
        for info in dataclasses.fields(section_type)
    }


def _scalar(hint: Any) -> type:
    """``str | None`` -> ``str``."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a knob, grouped by section; defaults are shown but not set, so presets and files come in between."""
    for section, section_type in _sections(DistillConfig):
        group = parser.add_argument_group(section, (section_type.__doc__ or "").splitlines()[0])
        hints = typing.get_type_hints(section_type)
        for info in dataclasses.fields(section_type):
            kind = _scalar(hints[info.name])
            shown = "as the strategy says" if info.default is None else repr(info.default)
            text = f"{info.metadata['help']} [{shown}]".replace("%", "%%")
            flag = f"--{_dash(info.name)}"
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            else:
                group.add_argument(
                    flag,
                    type=kind,
                    choices=info.metadata["choices"],
                    default=argparse.SUPPRESS,
                    help=text,
                    metavar=None if info.metadata["choices"] else kind.__name__.upper(),
                )


def from_flat(values: dict[str, Any], origin: str = "configuration") -> DistillConfig:
    """Build and check the tree from ``{knob: value}``; unknown knobs and wrong types are refused by name.

    Raises:
        ValueError: naming ``origin``, the knob and what is wrong with it.
    """
    rest = dict(values)
    sections: dict[str, Any] = {}
    for section, section_type in _sections(DistillConfig):
        hints = typing.get_type_hints(section_type)
        chosen = {
            info.name: _typed(origin, info.name, hints[info.name], rest.pop(info.name))
            for info in dataclasses.fields(section_type)
            if info.name in rest
        }
        sections[section] = section_type(**chosen)
    if rest:
        raise ValueError(
            f"{origin}: unknown knob {sorted(rest)[0]!r}; `python -m megatron_tide.distill --help` lists them all"
        )
    return DistillConfig(**sections)


def _typed(origin: str, name: str, hint: Any, value: Any) -> Any:
    kind = _scalar(hint)
    if value is None and kind is not hint:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{origin}: {name} = {value!r} must be {kind.__name__}")
    return value


def read_config_file(path: str) -> dict[str, Any]:
    """Knobs of a JSON file: flat ``{knob: value}``, by section, or a recorded ``run.json``."""
    try:
        content = read_json(Path(path))
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    content = content.get("config", content)
    names = {section for section, _ in _sections(DistillConfig)}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if key in names and isinstance(value, dict) else {key: value})
    return flat


def parse(argv: list[str], description: str) -> tuple[DistillConfig, argparse.Namespace]:
    """Defaults <- ``--preset`` <- ``--config FILE`` <- flags; the checked config and the other arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="paper",
        help="a named set of knobs: " + "; ".join(f"{k}: {v.meaning}" for k, v in sorted(PRESETS.items())),
    )
    parser.add_argument("--config", default="", help="JSON file of knobs, or the run.json of another run")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the whole run (files, fingerprints, sizes), print it, stop"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher's
    add_flags(parser)
    arguments = parser.parse_args(argv)
    own = {"preset", "config", "dry_run", "local_rank"}
    flags = {name: value for name, value in vars(arguments).items() if name not in own}
    from_file = read_config_file(arguments.config) if arguments.config else {}
    config = from_flat({**PRESETS[arguments.preset].flags, **from_file, **flags}, arguments.config or "command line")
    config.check()
    return config, arguments
