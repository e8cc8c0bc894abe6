"""What stands for a release in a GGUF file: llama.cpp's names for Qwen3's tensors and settings, and our own keys.

llama.cpp's own programs read the file as the autoregressive model of the same shape; ``megatron_tide.*`` says how it
decodes in blocks. Its tokenizer is there twice: as llama.cpp's programs read it, and whole, as ``tokenizers`` does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_tide.gguf_header import FLOAT32, GgufHeader, read_header
from megatron_tide.models.checkpoint_keys import checkpoint_table, module_tensors
from megatron_tide.models.families import family_of, meta_model, read_config

ARCHITECTURE, MODEL_TYPE, OUR_OWN = "qwen3", "a2d-qwen3", "megatron_tide"
MOST_LAYERS = 512  # of llama.cpp
# Keys of config.json -> those of the file, and their type in Python (float: 32 bits).
KEYS: dict[str, tuple[str, type]] = {
    "vocab_size": ("qwen3.vocab_size", int),
    "max_position_embeddings": ("qwen3.context_length", int),
    "hidden_size": ("qwen3.embedding_length", int),
    "num_hidden_layers": ("qwen3.block_count", int),
    "intermediate_size": ("qwen3.feed_forward_length", int),
    "num_attention_heads": ("qwen3.attention.head_count", int),
    "num_key_value_heads": ("qwen3.attention.head_count_kv", int),
    "head_dim": ("qwen3.attention.key_length", int),
    "rms_norm_eps": ("qwen3.attention.layer_norm_rms_epsilon", float),
    "rope_theta": ("qwen3.rope.freq_base", float),
    "block_size": ("megatron_tide.block_size", int),
    "mask_token_id": ("megatron_tide.mask_token_id", int),
    "eos_token_id": ("megatron_tide.eos_token_id", int),
    "pad_token_id": ("megatron_tide.pad_token_id", int),
}
VALUE_LENGTH, LAYOUT = "qwen3.attention.value_length", "megatron_tide.block_layout"
_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def tensor_name(key: str) -> str:
    """llama.cpp's name of a tensor of the student."""
    found = _LAYER.fullmatch(key)
    return f"blk.{found[1]}.{_PARTS[found[2]]}.weight" if found else f"{_PARTS[key.removesuffix('.weight')]}.weight"


def read_release(path: Path) -> tuple[Any, GgufHeader]:
    """(the student's config, the header) of a file that ``convert-gguf`` wrote, or that was quantized from one.

    Raises:
        ValueError: another model, or a file that is corrupt.
        OSError: the disk.
    """
    header = read_header(path)
    architecture = header.values.get("general.architecture")
    if architecture != ARCHITECTURE or KEYS["block_size"][0] not in header.values:
        raise ValueError(
            f"{path}: {str(architecture)[:40]!r} without {KEYS['block_size'][0]}, so no block diffusion model; "
            "write one with convert-gguf, or run this file with llama.cpp"
        )
    values: dict[str, Any] = {name: header.value(key, kind) for name, (key, kind) in KEYS.items()}
    _check_others(header, values["head_dim"])
    tied = "output.weight" not in header.tensors
    try:
        layers = values["num_hidden_layers"]
        if not 1 <= layers <= MOST_LAYERS or len(header.tensors) != 11 * layers + 3 - tied:
            raise ValueError(f"{len(header.tensors)} tensors are not those of {layers} layers; write it again")
        _, config = read_config({**values, "model_type": MODEL_TYPE, "tie_word_embeddings": tied})
        if values["head_dim"] % 2 or values["num_attention_heads"] % values["num_key_value_heads"]:
            raise ValueError("its heads are none that attention can have; write it again")
        if max(values[f"{name}_token_id"] for name in ("mask", "eos", "pad")) >= values["vocab_size"]:
            raise ValueError("a token id is not in its vocabulary; write it again")
        _check_tensors(header, {**values, "model_type": MODEL_TYPE, "tie_word_embeddings": tied})
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('config: ')}") from None
    config.block_layout = header.value(LAYOUT, str)
    return config, header


def _check_others(header: GgufHeader, head_dim: int) -> None:
    """What else llama.cpp would read, and work with."""
    known = {key for key, _ in KEYS.values()} | {VALUE_LENGTH}
    odd = [key for key in header.values if key.startswith(("qwen3.", "split.", "adapter.")) and key not in known]
    if odd or header.values.get(VALUE_LENGTH) != head_dim:
        key = odd[0] if odd else VALUE_LENGTH
        raise ValueError(
            f"{header.path}: {key[:80]} is {str(header.values.get(key))[:20]}, which convert-gguf does not write; "
            "write it again"
        )


def _check_tensors(header: GgufHeader, values: dict[str, Any]) -> None:
    model = meta_model(values)
    tensors = module_tensors(model)
    for key, slot in checkpoint_table(tensors, family_of(model)).items():
        name, shape = tensor_name(key), tuple(slot.of(tensors).shape)
        stored = header.tensors.get(name)
        if stored is None or stored.shape != shape:
            found = "missing" if stored is None else f"of shape {list(stored.shape)}, not {list(shape)}"
            raise ValueError(f"tensor {name} is {found}; write it again")
        if len(shape) == 1 and stored.kind != FLOAT32:
            raise ValueError(f"tensor {name} is not in fp32; write it again")
