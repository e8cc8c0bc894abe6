"""The words that flags take, and the code behind each: one line per strategy, objective, noise schedule, masking, ...

To add one, write its code in its own room and its line here. Flags and their help, the checks of a run, and the code
itself read these tables. Code is written "module:name", relative to the package, and imported when it is first looked
up, so that ``--help`` imports no torch. From outside the package the line is
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
    """``meaning``: for the help. ``code``: the object behind the word, or "module:name" of it."""

    meaning: str
    code: Any

    def load(self) -> Any:
        """The object."""
        if not isinstance(self.code, str):
            return self.code
        module, _, name = self.code.partition(":")
        return getattr(importlib.import_module(f"megatron_tide.{module}"), name)


class Table(UserDict[str, Any]):
    """Word -> the object behind it. What is put in is a ``Choice``, what is looked up is its object."""

    def __getitem__(self, word: str) -> Any:
        return self.data[word].load()

    def __str__(self) -> str:
        """``word: meaning; word: meaning``."""
        return "; ".join(f"{word}: {choice.meaning}" for word, choice in self.data.items())


def or_none(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """``table`` with the word "none" for no object."""
    return ChainMap(table, {"none": None})  # type: ignore[arg-type]


def named(table: Mapping[str, Value], name: str, what: str) -> Value:
    """``table[name]``, or ValueError with the valid names; ``what``: how the message calls an entry."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; use one of {', '.join(table)}")
    return table[name]


NOISE_SCHEDULES = Table(
    {"linear": Choice("a share t of the tokens is masked (published)", "diffusion.noise_schedule:LINEAR")}
)

MASKINGS = Table(
    {
        "expand": Choice("sample tokens, then mask their whole chunks (published)", "diffusion.masking:EXPAND"),
        "synchronous": Choice("sample chunks", "diffusion.masking:SYNCHRONOUS"),
    }
)

ATTENTION_LAYOUTS = Table(
    {
        "full": Choice("every position sees every other (published)", "diffusion.layouts:full"),
        "block_causal": Choice("a block sees itself and those before it", "diffusion.layouts:block_causal"),
        "staircase": Choice(
            "as the student: a noised block sees itself and clean ones before it", "diffusion.layouts:staircase"
        ),
    }
)

COMPDEMO_SPLITS = Table({"bernoulli": Choice("a coin each", False), "exact": Choice("exactly this share", True)})
COMPDEMO_UNITS = Table({"chunk": Choice("a chunk", False), "token": Choice("a teacher token", True)})

CHUNK_OBJECTIVES = Table(
    {
        "calm": Choice("CALM", "objectives.chunk:CALM"),
        "reverse_calm": Choice("Reverse CALM", "objectives.chunk:REVERSE_CALM"),
        "bernoulli_kl": Choice("KL(student || teacher) of Bernoullis", "objectives.chunk:BERNOULLI_KL"),
    }
)

DISTRIBUTION_OBJECTIVES = Table(
    {
        "forward_kl": Choice("KL(teacher || student)", "objectives.distribution:FORWARD_KL"),
        "reverse_kl": Choice("KL(student || teacher)", "objectives.distribution:REVERSE_KL"),
    }
)

TIDAL_USES = Table(
    {
        "off": Choice("the teacher alone", "objectives.tidal:OFF"),
        "mix": Choice("mix the student into the target", "objectives.tidal:MIX"),
        "weight": Choice("weight the loss", "objectives.tidal:WEIGHT"),
    }
)

TIDAL_AXES = Table(
    {
        "both": Choice("progress and noise", "objectives.tidal:both_axes"),
        "training": Choice("progress", "objectives.tidal:training_axis"),
        "timestep": Choice("noise", "objectives.tidal:timestep_axis"),
    }
)

TIDAL_RAMPS = Table(
    {
        "cosine": Choice("half a cosine", "objectives.tidal:cosine_ramp"),
        "linear": Choice("a line", "objectives.tidal:linear_ramp"),
    }
)

OPTIMIZERS = Table({"adamw": Choice("AdamW (published)", "optimizer:ADAMW")})

# Code: a TeacherBackend with ``open``. zero3... is ds_configs/teacher_NAME.json, pipeline_N is N stages.
TEACHER_HOSTINGS = Table(
    {
        "replicated": Choice("a copy on every rank", "hosting.backend:ReplicatedTeacher"),
        "zero3": Choice("a shard of every layer on each rank's GPU", "hosting.zero3:Zero3Teacher"),
        "zero3_cpu": Choice("the shards in host memory", "hosting.zero3:Zero3Teacher"),
        "zero3_nvme": Choice("the shards on a fast disk", "hosting.zero3:Zero3Teacher"),
        "pipeline_2": Choice("half of the layers on each of 2 ranks", "hosting.pipeline:PipelineTeacher"),
        "pipeline_4": Choice("a quarter on each of 4", "hosting.pipeline:PipelineTeacher"),
        "pipeline_8": Choice("an eighth on each of 8", "hosting.pipeline:PipelineTeacher"),
    }
)


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
