"""The registry of model families: the one place that knows what a ``config.json``'s ``model_type`` means.

A family is one row of :data:`FAMILIES` and its module. To add one, write its module (a ``PreTrainedModel`` with
``backbone`` and ``head_weight``) and its row; no other code depends on the family of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from megatron_tide.bounds import check_config, plain, short
from megatron_tide.files import read_json
from megatron_tide.machine import free_memory
from megatron_tide.models.a2d_llama import A2DLlamaConfig, A2DLlamaLMHeadModel
from megatron_tide.models.a2d_qwen3 import A2DQwen3Config, A2DQwen3LMHeadModel
from megatron_tide.models.causal import LlamaForCausalLM, Qwen3ForCausalLM
from megatron_tide.models.llada2 import LLaDA2Config, LLaDA2MoeModelLM
from megatron_tide.models.modeling_sdar import SDARConfig, SDARForCausalLM

ConfigSource = str | Path | dict[str, Any]
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_ROPE_KEYS = {  # of the latter two, in transformers
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
}


class ConfigFormat(Protocol):
    """How a family's ``config.json`` is read and written."""

    def read(self, values: dict[str, Any]) -> Any:
        """The config object. ValueError for values that describe no model of the family."""
        ...

    def write(self, config: Any) -> dict[str, Any]:
        """The dict of ``config.json``, without ``model_type`` and the like."""
        ...


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """:class:`ConfigFormat` of a transformers model: its class, the keys it must have, and those that it may have.

    Only these keys are read (others, such as ``attn_implementation``, make transformers run code from the hub) and
    written, without those that the installed transformers adds. RoPE is written as ``rope_theta`` and ``rope_scaling``,
    which transformers 4 and 5 both read.
    """

    config_class: type[PretrainedConfig]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def read(self, values: dict[str, Any]) -> Any:
        """The config object. ValueError names the keys that are missing."""
        missing = [key for key in self.required if values.get(key) is None]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        if values.get("rope_theta") is None and "rope_theta" not in (values.get("rope_parameters") or {}):
            raise ValueError("missing rope_theta")
        known = (*self.required, *self.optional, *_ROPE, "layer_types")
        return self.config_class(**{key: values[key] for key in known if key in values})

    def write(self, config: Any) -> dict[str, Any]:
        """The dict of ``config.json``, without ``model_type`` and the like."""
        values = config.to_dict()
        rope = values.get("rope_parameters") or {
            "rope_theta": values["rope_theta"],
            **(values.get("rope_scaling") or {}),
        }
        rope = plain({key: value for key, value in rope.items() if key in _ROPE_KEYS})
        usual = rope.get("rope_type", "default") == "default"
        written = {key: values[key] for key in (*self.required, *self.optional) if key in values}
        return {**written, "rope_theta": rope["rope_theta"], "rope_scaling": None if usual else rope}


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Paths of a model's parts, for running it layer by layer. The defaults are transformers' names.

    ``rotary``: a module built from the config alone and called as ``rotary(hidden, position_ids) -> (cos, sin)``.
    A layer is called as ``layer(hidden, attention_mask=..., position_embeddings=(cos, sin))`` and returns its next
    hidden states. ``joint_mlp``: its ``attention_block`` runs for each micro-batch, then its ``mlp_block`` once over
    the tokens of all of them (experts' weights are then read once).
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    output: str = "lm_head"
    rotary: str = "model.rotary_emb"
    joint_mlp: bool = False


@dataclass(frozen=True, kw_only=True)
class ReleaseFiles:
    """What a release contains in addition to weights, config and tokenizer.

    ``code``: files of this folder that are copied. ``auto_map``: the entry of ``config.json`` that makes transformers
    use them. Empty for a format that has its code elsewhere: such a release loads with this package. ``of``: the model
    type that training makes, of which this is another format with the same tensors, but the output embedding written
    out. ``mask_id``: the only mask token that programs of this format know. ``serving``: a file of
    ``megatron_tide.release`` that says how they start, for the model card.
    """

    code: tuple[str, ...] = ()
    auto_map: dict[str, str] = field(default_factory=dict)
    of: str = ""
    mask_id: int | None = None
    serving: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: all that the project knows about a kind of model.

    ``model_types``: values of ``config.json``'s ``model_type``; the first one is written. ``module``: called with a
    config; has ``backbone(input_ids, attention_mask, position_ids, past_key_values)`` -> [B, L, H] and ``head_weight``
    [V, H]. ``config``: reads and writes ``config.json``. ``checkpoint_keys``: see
    :func:`megatron_tide.models.checkpoint_keys.checkpoint_table`. ``stored_precision``: endings of tensor names that
    are never cast. ``shifts_by_one``: the row at a position predicts the NEXT token, not its own. ``trains_as``: the
    model type that training makes of it ("" for its own). ``block_layout``: where blocks begin in its published
    generation (a key of ``BLOCKS_AT_ANSWER``), which evaluation keeps; "" where the evaluation's preset decides.
    """

    model_types: tuple[str, ...]
    module: type[PreTrainedModel]
    config: ConfigFormat
    checkpoint_keys: Mapping[str, str] = field(default_factory=dict)
    stored_precision: tuple[str, ...] = ()
    layout: LayerLayout = LayerLayout()
    generation: Literal["block_diffusion", "autoregressive"] = "block_diffusion"
    shifts_by_one: bool = False
    trains_as: str = ""
    block_layout: Literal["", "sequence", "answer"] = ""
    release: ReleaseFiles = ReleaseFiles()

    def keeps_precision(self, name: str) -> bool:
        """Whether a tensor keeps its stored precision when the other tensors are cast."""
        return name.endswith(self.stored_precision)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a row to :data:`FAMILIES`, in place of earlier ones of its model types."""
    FAMILIES.update(dict.fromkeys(family.model_types, family))


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
_OPTIONAL = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "rms_norm_eps",
    "use_cache",
)
_QWEN3_REQUIRED = (*_REQUIRED, "head_dim")
_QWEN3_OPTIONAL = (*_OPTIONAL, "max_window_layers", "sliding_window", "use_sliding_window")
_LLAMA_OPTIONAL = (*_OPTIONAL, "head_dim", "mlp_bias")
_STUDENT = ("block_size", "mask_token_id")

_AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")
_DECODING = ("backbone_a2d.py", "generation_a2d.py", "decoding_a2d.py", "sampling_a2d.py")


def _student_release(file: str, config: type[PretrainedConfig], module: type[PreTrainedModel]) -> ReleaseFiles:
    """The files of a student whose own classes are in ``file``.py."""
    return ReleaseFiles(
        code=(f"{file}.py", *_DECODING),
        auto_map={"AutoConfig": f"{file}.{config.__name__}"} | dict.fromkeys(_AUTO, f"{file}.{module.__name__}"),
    )


# The paper's student, and WeDLM, which has the same tensors under the same names (the mask decides what each token
# sees).
register(
    Family(
        model_types=("a2d-qwen3", "wedlm"),
        module=A2DQwen3LMHeadModel,
        config=HubConfig(config_class=A2DQwen3Config, required=_QWEN3_REQUIRED, optional=(*_QWEN3_OPTIONAL, *_STUDENT)),
        release=_student_release("a2d_qwen3", A2DQwen3Config, A2DQwen3LMHeadModel),
    )
)
# SDAR, whose tensors have Qwen3's names too. Engines know its mask token by number and look for a separate output
# embedding. Training makes the student of it, and a release of a student can be written as one.
register(
    Family(
        model_types=("sdar",),
        module=SDARForCausalLM,
        config=HubConfig(config_class=SDARConfig, required=_QWEN3_REQUIRED, optional=(*_QWEN3_OPTIONAL, *_STUDENT)),
        trains_as="a2d-qwen3",
        block_layout="sequence",
        release=ReleaseFiles(
            code=("modeling_sdar.py", "a2d_qwen3.py", *_DECODING),
            auto_map={
                "AutoConfig": "modeling_sdar.SDARConfig",
                "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
                "AutoModel": "modeling_sdar.SDARForCausalLM",
            },
            of="a2d-qwen3",
            mask_id=151669,
            serving="serving_sdar.md",
        ),
    )
)
register(
    Family(
        model_types=("a2d-llama",),
        module=A2DLlamaLMHeadModel,
        config=HubConfig(config_class=A2DLlamaConfig, required=_REQUIRED, optional=(*_LLAMA_OPTIONAL, *_STUDENT)),
        release=_student_release("a2d_llama", A2DLlamaConfig, A2DLlamaLMHeadModel),
    )
)
# Plain autoregressive models: the paper's baseline, and what a student can start from.
register(
    Family(
        model_types=("qwen3",),
        module=Qwen3ForCausalLM,
        config=HubConfig(config_class=Qwen3Config, required=_QWEN3_REQUIRED, optional=_QWEN3_OPTIONAL),
        generation="autoregressive",
        shifts_by_one=True,
        trains_as="a2d-qwen3",
    )
)
register(
    Family(
        model_types=("llama",),
        module=LlamaForCausalLM,
        config=HubConfig(config_class=LlamaConfig, required=_REQUIRED, optional=_LLAMA_OPTIONAL),
        generation="autoregressive",
        shifts_by_one=True,
        trains_as="a2d-llama",
    )
)
# LLaDA2.0-mini and 2.1-mini. The public code for this format is published elsewhere.
register(
    Family(
        model_types=("llada2_moe",),
        module=LLaDA2MoeModelLM,
        config=LLaDA2Config,
        checkpoint_keys={r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)": r"\1.{index}.\2.weight"},
        stored_precision=(".expert_bias",),
        block_layout="sequence",
        layout=LayerLayout(embedding="model.word_embeddings", joint_mlp=True),
    )
)
AutoConfig.register(A2DQwen3Config.model_type, A2DQwen3Config, exist_ok=True)
AutoModelForMaskedLM.register(A2DQwen3Config, A2DQwen3LMHeadModel, exist_ok=True)
AutoConfig.register(A2DLlamaConfig.model_type, A2DLlamaConfig, exist_ok=True)
AutoConfig.register(SDARConfig.model_type, SDARConfig, exist_ok=True)
AutoModelForMaskedLM.register(A2DLlamaConfig, A2DLlamaLMHeadModel, exist_ok=True)


def read_config(source: ConfigSource, *, as_student: bool = False) -> tuple[Family, Any]:
    """(family, config object) of a hub-format folder, a ``config.json``, or its dict.

    ``as_student``: the family that training makes of it. ValueError for a file that is missing or broken, an unknown
    model_type, or a config that describes no model of the family.
    """
    where, values = _read(source)
    model_type = values.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(f"{where}: model_type {short(repr(model_type))} is not one of {', '.join(sorted(FAMILIES))}")
    if as_student and family.trains_as:
        family = FAMILIES[family.trains_as]
    with _describing(where):
        check_config(values)
        return family, family.config.read(values)


@contextmanager
def _describing(where: str) -> Iterator[None]:
    """Whatever a configuration class or module raises for values that describe no model becomes one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"describes no model ({type(error).__name__}): "
        raise ValueError(f"{where}: {kind}{' '.join(str(error).split())[:500]}") from None


def generation_of(source: ConfigSource) -> Literal["block_diffusion", "autoregressive"]:
    """How the model of a config generates; one of no family is autoregressive if transformers knows it as causal, but
    no encoder, which has a causal class only to be trained as one.

    Raises:
        ValueError: neither.
    """
    where, values = _read(source)
    model_type = str(values.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type].generation
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and values.get("is_decoder") is not True
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder:
        return "autoregressive"
    raise ValueError(
        f"{where}: model_type {short(repr(model_type))} is neither a block diffusion model nor a causal model of "
        "transformers"
    )


def _read(source: ConfigSource) -> tuple[str, dict[str, Any]]:
    """(where, values) of a hub-format folder, a ``config.json``, or its dict."""
    if isinstance(source, dict):
        return "config", source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return str(path), read_json(path)


def family_of(model: nn.Module) -> Family:
    """The family of a module that this package built."""
    config: Any = model.config
    return FAMILIES[config.model_type]


def config_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a model with weights stored in ``dtype``."""
    family = family_of(model)
    return {
        **family.config.write(model.config),
        "model_type": family.model_types[0],
        "architectures": [family.module.__name__],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def meta_model(source: ConfigSource, *, as_student: bool = False) -> Any:
    """The module of a config on torch's meta device: shapes without memory."""
    family, config = read_config(source, as_student=as_student)
    with torch.device("meta"), _describing("config" if isinstance(source, dict) else str(source)):
        return family.module(config)


def parameter_count(source: ConfigSource) -> int:
    """The number of parameters that a config describes, a tied one counted once; nothing is allocated."""
    return sum(parameter.numel() for parameter in meta_model(source).parameters())


def fresh_model(source: ConfigSource, seed: int) -> Any:
    """A model with random weights, fp32, on CPU: a function of config and seed. torch's own random state is kept."""
    family, config = read_config(source)
    needed, free = 4 * parameter_count(source), free_memory()
    if needed > free:
        raise ValueError(f"{needed / 2**30:.1f} GiB of weights, more than the {free / 2**30:.1f} GiB of free memory")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.module(config)
