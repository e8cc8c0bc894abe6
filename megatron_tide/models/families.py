"""The model types we know: how a ``config.json`` becomes a module and is written again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from megatron_tide.files import read_json
from megatron_tide.models.a2d_qwen3 import A2DQwen3Config, A2DQwen3LMHeadModel
from megatron_tide.models.llada2 import LLaDA2MoeModelLM
from megatron_tide.models.llada2_config import LLaDA2Config

AutoConfig.register(A2DQwen3Config.model_type, A2DQwen3Config, exist_ok=True)
AutoModelForMaskedLM.register(A2DQwen3Config, A2DQwen3LMHeadModel, exist_ok=True)

ConfigSource = str | Path | dict[str, Any]

_QWEN3_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
# What else a public Qwen3 config.json holds, and our two: all that is written, whatever the running transformers adds.
_QWEN3_OPTIONAL = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "rms_norm_eps",
    "sliding_window",
    "use_cache",
    "use_sliding_window",
    "block_size",
    "mask_token_id",
)
# These say how a file was made or is run, not what the model is.
_NOT_OURS = ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")


def _qwen3_config(values: dict[str, Any]) -> A2DQwen3Config:
    lacking = [key for key in _QWEN3_REQUIRED if values.get(key) is None]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}")
    if values.get("rope_theta") is None and "rope_theta" not in (values.get("rope_parameters") or {}):
        raise ValueError("lacks rope_theta")
    return A2DQwen3Config(**{key: value for key, value in values.items() if key not in _NOT_OURS})


def _qwen3_dict(config: A2DQwen3Config) -> dict[str, Any]:
    values = config.to_dict()
    # The flat rope_theta of the public files: transformers 4 reads nothing else, and 5 reads it too.
    rope = values.get("rope_parameters") or {"rope_theta": values["rope_theta"], **(values.get("rope_scaling") or {})}
    plain = rope.get("rope_type", "default") == "default"
    written = {key: values[key] for key in (*_QWEN3_REQUIRED, *_QWEN3_OPTIONAL) if key in values}
    return {**written, "rope_theta": rope["rope_theta"], "rope_scaling": None if plain else rope}


def _build_qwen3(config: A2DQwen3Config) -> nn.Module:
    model = A2DQwen3LMHeadModel(config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _fresh_llada2(config: LLaDA2Config) -> nn.Module:
    model = LLaDA2MoeModelLM(config)
    model.init_weights()
    return model


@dataclass(frozen=True, kw_only=True)
class Family:
    """One public model type: reading and writing its config, building its module, building it with random weights."""

    model_type: str
    architecture: str
    read_config: Callable[[dict[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], nn.Module]
    fresh: Callable[[Any], nn.Module]


_QWEN3 = Family(
    model_type=A2DQwen3Config.model_type,
    architecture=A2DQwen3LMHeadModel.__name__,
    read_config=_qwen3_config,
    write_config=_qwen3_dict,
    build=_build_qwen3,
    fresh=_build_qwen3,
)
_LLADA2 = Family(
    model_type=LLaDA2Config.model_type,
    architecture=LLaDA2MoeModelLM.__name__,
    read_config=LLaDA2Config.from_dict,
    write_config=LLaDA2Config.to_dict,
    build=LLaDA2MoeModelLM,
    fresh=_fresh_llada2,
)
# WeDLM and plain Qwen3 hold the student's weights under the student's names; who sees whom is the mask's business.
FAMILIES = {"a2d-qwen3": _QWEN3, "qwen3": _QWEN3, "wedlm": _QWEN3, "llada2_moe": _LLADA2}


def read_config(source: ConfigSource) -> tuple[Family, Any]:
    """(family, config object) of a hub-format folder, a ``config.json``, or its dict.

    ValueError for a file that is missing or broken, an unknown model_type, or a config that describes no model of ours.
    """
    where = "config"
    if not isinstance(source, dict):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        source, where = read_json(path), str(path)
    model_type = source.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(f"{where}: model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    try:
        return family, family.read_config(source)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def config_dict(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a model whose weights are stored in ``dtype``."""
    config: Any = model.config
    family = FAMILIES[config.model_type]
    return {
        **family.write_config(config),
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def meta_model(source: ConfigSource) -> nn.Module:
    """The module of a config with its shapes and no memory (torch's meta device)."""
    family, config = read_config(source)
    with torch.device("meta"):
        return family.build(config)


def parameter_count(source: ConfigSource) -> int:
    """How many parameters a config describes, a tied one counted once; nothing is allocated."""
    return sum(parameter.numel() for parameter in meta_model(source).parameters())


def fresh_model(source: ConfigSource, seed: int) -> nn.Module:
    """A model with random weights, fp32, on CPU: a function of config and seed. torch's own random state is kept."""
    family, config = read_config(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.fresh(config)
