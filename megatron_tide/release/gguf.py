"""Release -> one GGUF file for llama.cpp: weights as they are or quantized, settings, tokenizer.

Tensors are read, quantized (by the ``gguf`` package, in numpy) and written one at a time.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.bridge.loading import GGUF_ROLES, GGUF_TEMPLATE, GGUF_TOKENIZER
from megatron_tide.bridge.tiktoken import QWEN_PATTERN
from megatron_tide.bridge.tokenizer_files import ROLES, check_own
from megatron_tide.files import TEMPORARY, read_json, read_regular, remove, replacing
from megatron_tide.gguf_header import MAGIC
from megatron_tide.hub import one_line
from megatron_tide.lock import lock_beside
from megatron_tide.models import read_config
from megatron_tide.models.checkpoint_keys import module_tensors
from megatron_tide.models.families import meta_model
from megatron_tide.models.gguf_release import (
    ARCHITECTURE,
    KEYS,
    LAYOUT,
    MODEL_TYPE,
    VALUE_LENGTH,
    read_release,
    tensor_name,
)
from megatron_tide.models.load import checked_table, stated_layout
from megatron_tide.models.shards import ShardedFolder

# --type -> (of matrices, of the embeddings, llama.cpp's number of the mixture). The output embedding decides the
# tokens, so it takes more bits than the layers, as in llama.cpp's own mixtures.
TYPES: dict[str, tuple[str, str, int]] = {
    "f32": ("F32", "F32", 0),
    "bf16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q4_0": ("Q4_0", "Q8_0", 2),
}
FALLBACK = "BF16"  # of a matrix whose rows no quantized block fits into
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_ROWS = 4096  # quantized at once
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_QWEN_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
# llama.cpp's name of a rule that splits text before the merges -> how tokenizers writes it.
PRE_TOKENIZERS: dict[str, Any] = {
    "qwen2": {"type": "Sequence", "pretokenizers": [_QWEN_SPLIT, {**_BYTES, "use_regex": False}]},
    "gpt-2": {**_BYTES, "use_regex": True},
}


def convert_to_gguf(release: str | Path, out: str | Path, kind: str, *, overwrite: bool = False) -> list[str]:
    """Write ``release`` (a folder in hub format, of Qwen3's shape) as the file ``out``, complete or not at all; the
    names of matrices that stayed in ``FALLBACK``.

    ``kind``: a key of ``TYPES``.

    Raises:
        ValueError: no such release, one that llama.cpp cannot run, or an ``out`` that exists.
        OSError: the disk.
    """
    release, out = Path(release), Path(out)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("convert-gguf: needs gguf; pip install -r requirements-gguf.txt")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise ValueError(f"{out}: exists and is not a file; choose another name")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: already exists; choose another name, or pass --overwrite to replace it")
    if out.exists() and read_regular(out, 4) not in (MAGIC, b""):
        raise ValueError(f"{out}: no GGUF file, so --overwrite does not replace it; choose another name")
    values, tokenizer = _settings(release), load_tokenizer(release)
    for file in release.glob("*.j*"):  # all of the tokenizer goes out
        check_own(file)
    words = _vocabulary(release, tokenizer, values["vocab_size"])
    with lock_beside(out):
        own = re.compile(rf"{re.escape(TEMPORARY)}\d+-{re.escape(out.name)}")
        # Of a process that was killed; another one may be writing other-NAME.
        for left in [path for path in out.parent.iterdir() if own.fullmatch(path.name)]:
            remove(left)
        with replacing(out) as (draft, _):
            kept = _write(draft, release, values, tokenizer, words, kind)
            _check_draft(draft, tokenizer)
    return kept


def _settings(release: Path) -> dict[str, Any]:
    """The values of ``KEYS`` and what else decides; ValueError where llama.cpp's Qwen3 computes something else."""
    family, config = read_config(release)
    shape = family.trains_as or family.model_types[0]
    if shape != MODEL_TYPE or family.generation != "block_diffusion":
        raise ValueError(
            f"{release}: a {config.model_type} model; only a block diffusion model of Qwen3's shape can be written as "
            "GGUF (a training checkpoint: convert it with convert first)"
        )
    values = read_json(release / "config.json")
    values |= {name: getattr(config, name, None) for name in (*KEYS, "attention_bias", "hidden_act")}
    rope = config.rope_parameters or {}
    values["rope_theta"] = rope.get("rope_theta")
    for name in KEYS:
        if values[name] is None or isinstance(values[name], list):
            raise ValueError(f"{release}/config.json: needs one {name}; convert the checkpoint again")
    values["block_layout"] = stated_layout(release) or "sequence"
    others = {"attention_bias": values["attention_bias"], "rope_type": rope.get("rope_type", "default") != "default"}
    others["hidden_act"] = values["hidden_act"] != "silu"
    if wrong := [name for name, other in others.items() if other]:
        raise ValueError(f"{release}: its {wrong[0]} is none that llama.cpp's {ARCHITECTURE} has; it cannot be written")
    return values


def _vocabulary(release: Path, tokenizer: TextTokenizer, size: int) -> dict[str, Any]:
    """llama.cpp's tokens, types, merges and splitting rule."""
    if tokenizer.raw is None:
        raise ValueError(f"{release}: no byte-level BPE tokenizer, which is what can be written as GGUF")
    spec = json.loads(tokenizer.raw.backend_tokenizer.to_str())
    model, rule = spec["model"], _without(spec["pre_tokenizer"], "trim_offsets")
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"{release}: no byte-level BPE tokenizer, which is what can be written as GGUF")
    pre = next((name for name, known in PRE_TOKENIZERS.items() if known == rule), None)
    if pre is None:
        raise ValueError(
            f"{release}: its tokenizer splits text by a rule that is none of {', '.join(PRE_TOKENIZERS)}, so llama.cpp "
            "would make other tokens"
        )
    strings, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    if tokenizer.vocab_size > size:
        raise ValueError(f"{release}: {tokenizer.vocab_size} tokens, but config.json has vocab_size {size}")
    for token, index in model["vocab"].items():
        strings[index], kinds[index] = token, _NORMAL
    for added in spec["added_tokens"]:
        strings[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"pre": pre, "strings": strings, "kinds": kinds, "merges": merges, "spec": json.dumps(spec)}


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(item, key) for name, item in value.items() if name != key}
    return [_without(item, key) for item in value] if isinstance(value, list) else value


def _write(
    draft: Path, release: Path, values: dict[str, Any], tokenizer: TextTokenizer, words: dict[str, Any], kind: str
) -> list[str]:
    from gguf import GGUFWriter

    writer = GGUFWriter(draft, ARCHITECTURE)
    writer.add_name(one_line(release.resolve().name))
    writer.add_file_type(TYPES[kind][2])
    writer.add_quantization_version(2)
    for name, (key, type_of) in KEYS.items():
        (writer.add_uint32 if type_of is int else writer.add_float32)(key, values[name])
    writer.add_uint32(VALUE_LENGTH, values["head_dim"])
    writer.add_string(LAYOUT, values["block_layout"])
    _add_tokenizer(writer, values, tokenizer, words)
    shapes, kept = _shapes(release), []
    kinds = {key: _kind_of(tensor_name(key), shape, kind) for key, shape in shapes.items()}
    for key, shape in shapes.items():
        block, size = _block(kinds[key])
        count = math.prod(shape) // block * size
        # A type's own number, and the shape in values: gguf takes bytes only for arrays of bytes.
        writer.add_tensor_info(tensor_name(key), shape, np.dtype(np.float32), count, raw_dtype=_number(kinds[key]))
        if kinds[key] == FALLBACK != TYPES[kind][0] and len(shape) > 1:
            kept.append(tensor_name(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in _in_order(ShardedFolder(release), list(shapes)):
        writer.write_tensor_data(_quantized(tensor, kinds[key]))
    writer.close()
    return kept


def _add_tokenizer(writer: Any, values: dict[str, Any], tokenizer: TextTokenizer, words: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(words["strings"])
    writer.add_token_types(words["kinds"])
    writer.add_token_merges(words["merges"])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(values["eos_token_id"])
    writer.add_pad_token_id(values["pad_token_id"])
    writer.add_mask_token_id(values["mask_token_id"])
    template = tokenizer.raw.chat_template
    template = template.get("default") if isinstance(template, dict) else template  # of several
    if template is not None:
        writer.add_string(GGUF_TEMPLATE, template)
    writer.add_string(GGUF_TOKENIZER, words["spec"])
    roles = {name: str(token) for name, token in tokenizer.raw.special_tokens_map.items() if name in ROLES}
    writer.add_string(GGUF_ROLES, json.dumps(roles))


def _shapes(release: Path) -> dict[str, list[int]]:
    """{key of the release: its shape}, as the config describes them and the folder has them."""
    model = meta_model(release)
    tensors = module_tensors(model)
    return {key: list(slot.of(tensors).shape) for key, slot in checked_table(ShardedFolder(release), model).items()}


def _in_order(source: ShardedFolder, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for key in keys:
        yield from source.tensors([key])


def _kind_of(name: str, shape: list[int], kind: str) -> str:
    if len(shape) == 1:
        return "F32"  # llama.cpp multiplies by these in fp32
    matrices, embeddings, _ = TYPES[kind]
    wanted = embeddings if name in _EMBEDDINGS else matrices
    return wanted if shape[-1] % _block(wanted)[0] == 0 else FALLBACK


def _number(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def _block(kind: str) -> tuple[int, int]:
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES[_number(kind)]


def _quantized(tensor: torch.Tensor, kind: str) -> np.ndarray:
    from gguf import quantize

    parts = [quantize(rows.float().numpy(), _number(kind)) for rows in tensor.split(_ROWS)]
    return np.ascontiguousarray(np.concatenate(parts))


def _check_draft(draft: Path, tokenizer: TextTokenizer) -> None:
    """The file is read as it will be; a tokenizer that changed on the way is our mistake."""
    read_release(draft)
    again = load_tokenizer(draft)
    for name in ("fingerprint", "template_fingerprint", "mask_id", "eos_id", "pad_id"):
        if getattr(again, name) != getattr(tokenizer, name):
            raise ValueError(f"{tokenizer.name}: its {name} is another one in GGUF, so its text would be")
