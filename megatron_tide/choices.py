"""Registries: the values that flags accept, and the code behind each (strategies, objectives, noise schedules, ...).

To add one, write its code in its package and its line here. Flags and their help, the checks of a run, and the code
itself read them. Code is written "module:name", relative to the package, and imported when it is first looked
up, so that ``--help`` imports no torch. Code outside the package registers with
``NOISE_SCHEDULES["mine"] = Choice("what it is", Mine())``.
"""

from __future__ import annotations

import importlib
from collections import ChainMap, UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Choice:
    """``meaning``: text for ``--help``. ``code``: the object behind the name, or its "module:name"."""

    meaning: str
    code: Any

    def load(self) -> Any:
        """The object."""
        if not isinstance(self.code, str):
            return self.code
        module, _, name = self.code.partition(":")
        return getattr(importlib.import_module(f"megatron_tide.{module}"), name)


class Registry(UserDict[str, Any]):
    """Name -> object. Values are stored as ``Choice`` and looked up as the object."""

    def __getitem__(self, name: str) -> Any:
        return self.data[name].load()

    def __str__(self) -> str:
        """``name: meaning; name: meaning``."""
        return "; ".join(f"{name}: {choice.meaning}" for name, choice in self.data.items())


def or_none(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """``table`` plus the name "none" for no object."""
    return ChainMap(table, {"none": None})  # type: ignore[arg-type]


def named(table: Mapping[str, Value], name: str, what: str) -> Value:
    """``table[name]``, or ValueError with the valid names; ``what``: the kind of entry, for the message."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; use one of {', '.join(table)}")
    return table[name]


CORPUS_SPLITS = Registry(
    function=Choice("equal and near-equal bodies stay together", "data.corpus:by_function"),
    file=Choice("the functions of a file stay together", "data.corpus:by_file"),
)

NOISE_SCHEDULES = Registry(
    linear=Choice("mask each token with probability t (published)", "diffusion.noise_schedule:LINEAR")
)

TIMESTEPS = Registry(
    sample=Choice("one per sample (published)", False),
    block=Choice("one per block of the student: less variance", True),
)
TIMESTEP_SAMPLINGS = Registry(
    independent=Choice("uniform (published)", False),
    stratified=Choice("spread evenly over the blocks of a sample and over the global batch", True),
)
MASK_COUNTS = Registry(
    bernoulli=Choice("each unit with the probability of its timestep, weight 1 / t (published)", False),
    exact=Choice("k of n units, k uniform on 1..n, weight n / k: the same mean, less variance", True),
)

OWN_MASKS = Registry(
    random=Choice("at random, as for all other text", False),
    order=Choice(
        "as its decoder had them: of each block, what was undecided before one of its passes, drawn evenly", True
    ),
)

LIKELIHOOD_NOISE = Registry(
    sample=Choice("one timestep per sample, one coin flip per chunk", "evaluate.likelihood_noise:PER_SAMPLE"),
    block=Choice("one timestep per block, k of its n chunks: less variance", "evaluate.likelihood_noise:PER_BLOCK"),
)

MASKINGS = Registry(
    expand=Choice("sample tokens, then mask all chunks that contain one (published)", "diffusion.masking:EXPAND"),
    synchronous=Choice("sample chunks, each masked with probability t", "diffusion.masking:SYNCHRONOUS"),
)

ATTENTION_LAYOUTS = Registry(
    full=Choice("all positions (published)", "diffusion.layouts:full"),
    block_causal=Choice("its own block and earlier ones", "diffusion.layouts:block_causal"),
    staircase=Choice("same as the student: its own noised block and earlier clean ones", "diffusion.layouts:staircase"),
    causal=Choice("the tokens before, in one clean copy: for autoregressive teachers", "diffusion.layouts:causal"),
)

BLOCK_LAYOUTS = Registry(
    sequence=Choice("at multiples of the block size, as in training", False),
    answer=Choice("at the answer, as published", True),
)

COMPDEMO_SPLITS = Registry(
    bernoulli=Choice("one coin flip per unit (published)", False), exact=Choice("exactly this share of the units", True)
)
COMPDEMO_UNITS = Registry(chunk=Choice("one chunk", False), token=Choice("one teacher token", True))

CHUNK_OBJECTIVES = Registry(
    calm=Choice("CALM", "objectives.chunk:CALM"),
    reverse_calm=Choice("Reverse CALM", "objectives.chunk:REVERSE_CALM"),
    bernoulli_kl=Choice("KL(student || teacher) of Bernoullis", "objectives.chunk:BERNOULLI_KL"),
)

DISTRIBUTION_OBJECTIVES = Registry(
    forward_kl=Choice("KL(teacher || student)", "objectives.distribution:FORWARD_KL"),
    reverse_kl=Choice("KL(student || teacher)", "objectives.distribution:REVERSE_KL"),
)

DISTRIBUTION_ROWS = Registry(
    pairs=Choice("chunks of one student and one teacher token, averaged over chunks", False),
    byte_prefix=Choice(
        "the first token of every chunk; a teacher's token counts as the longest student token that it begins with",
        True,
    ),
)

TIDAL_USES = Registry(
    off=Choice("target is the teacher alone", "objectives.tidal:OFF"),
    mix=Choice("mix the student into the target with weight 1 - lambda", "objectives.tidal:MIX"),
    weight=Choice("multiply the loss by lambda", "objectives.tidal:WEIGHT"),
)

TIDAL_AXES = Registry(
    both=Choice("training progress and timestep", "objectives.tidal:both_axes"),
    training=Choice("training progress only", "objectives.tidal:training_axis"),
    timestep=Choice("timestep only", "objectives.tidal:timestep_axis"),
)

TIDAL_RAMPS = Registry(
    cosine=Choice("half a cosine period", "objectives.tidal:cosine_ramp"),
    linear=Choice("linear", "objectives.tidal:linear_ramp"),
)

OPTIMIZERS = Registry(
    adamw=Choice("AdamW (published)", "optimizer:ADAMW"),
    muon=Choice("Muon for the matrices of the layers, AdamW for the other parameters", "optimizer:MUON"),
)

LR_SCHEDULES = Registry(
    cosine=Choice("half a cosine period (published)", "train.schedule:cosine"),
    linear=Choice("a straight line", "train.schedule:linear"),
)

# Code: a class opened as (folder, first step, flags of the run), with ``check``, ``write`` and ``close``.
METRIC_LOGS = Registry(
    tensorboard=Choice("TensorBoard", "train.metric_logs:TensorBoard"),
    wandb=Choice("TensorBoard and Weights & Biases", "train.metric_logs:WeightsAndBiases"),
)

# Code: a TeacherBackend with ``open``. zero3... is ds_configs/teacher_NAME.json, pipeline_N is N stages.
TEACHER_HOSTINGS = Registry(
    replicated=Choice("a full copy per rank", "hosting.replicated:ReplicatedTeacher"),
    zero3=Choice("a shard of every layer per GPU", "hosting.zero3:Zero3Teacher"),
    zero3_cpu=Choice("shards in host memory", "hosting.zero3:Zero3Teacher"),
    zero3_nvme=Choice("shards on a fast local disk", "hosting.zero3:Zero3Teacher"),
    pipeline_2=Choice("half of the layers per rank", "hosting.pipeline:PipelineTeacher"),
    pipeline_4=Choice("a quarter", "hosting.pipeline:PipelineTeacher"),
    pipeline_8=Choice("an eighth", "hosting.pipeline:PipelineTeacher"),
    cached=Choice("none: outputs of the cache command", "hosting.cached:CachedTeacher"),
)


@dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """The parts of one strategy, by name; flags of the run override single parts.

    ``denoise`` and ``next_token``: the student's own losses (``diffusion.StudentLayout``). ``chunk_tidal`` and
    ``distribution_tidal``: what TIDAL does to each objective (``--tidal`` replaces both).
    ``where_vocabularies_differ``: the spec used instead if the two tokenizers differ.
    """

    meaning: str
    denoise: bool = True
    next_token: bool = False
    chunk: str = "none"
    distribution: str = "none"
    chunk_tidal: str = "off"
    distribution_tidal: str = "off"
    compdemo: bool = False
    where_vocabularies_differ: StrategySpec | None = None

    @property
    def distils(self) -> bool:
        """Whether it has an objective that needs a teacher."""
        return (self.chunk, self.distribution) != ("none", "none")


STRATEGIES: dict[str, StrategySpec] = {
    "bd3lm": StrategySpec(meaning="denoising only, no teacher: the baseline"),
    "ar": StrategySpec(meaning="next token only, causal attention, no teacher", denoise=False, next_token=True),
    "joint": StrategySpec(
        meaning="denoising of [xt ; x0] with a causal x0 that also predicts the next token, no teacher", next_token=True
    ),
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
    # TIDAL mixes the target of the forward KL, as in TIDE-Shared, and weights the chunk objective: it is reversed, and
    # mixing would work against it.
    "tide-bridge": StrategySpec(
        meaning="forward KL on one-to-one chunks, Bernoulli KL on the others, with CompDemo and TIDAL (ours)",
        chunk="bernoulli_kl",
        distribution="forward_kl",
        chunk_tidal="weight",
        distribution_tidal="mix",
        compdemo=True,
    ),
}
