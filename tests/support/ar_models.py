"""Tiny autoregressive models with a tokenizer that has no mask token, as the hub has them; and one as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tests.support.models import hub_tensors, tiny_llama_config, tiny_student_config, write_hub_folder
from tests.support.tokenizers import TEXTS, train_byte_bpe

UNUSED = "<|reserved|>"
CONFIGS = {"qwen3": tiny_student_config, "llama": tiny_llama_config}


def ar_folder(folder: Path, model_type: str, texts: list[str] = TEXTS, **changes: Any) -> Path:
    """A model in hub format; its vocabulary of 310 ids, in a model of 320, has an unused special token, and no mask."""
    train_byte_bpe(folder, texts, 310, mask=UNUSED)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    del config["mask_token"]
    settings.write_text(json.dumps(config))
    count = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 4
    changes = {"vocab_size": -(-count // 16) * 16, "eos_token_id": count - 2, "pad_token_id": count - 4, **changes}
    values = CONFIGS[model_type](model_type=model_type, **changes)
    del values["mask_token_id"], values["block_size"]
    return write_hub_folder(folder, values)


def write_gguf(file: Path, folder: Path, architecture: str = "llama", drop: str = "") -> Path:
    """The Llama of ``folder`` as GGUF, in fp32, as llama.cpp writes it; without the tensors whose name has ``drop``."""
    from gguf import GGUFWriter

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, architecture)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, tokenizer, config)
    for key, tensor in hub_tensors(config).items():
        name = _gguf_name(key)
        if not (drop and drop in name):
            permuted = {"q_proj": heads, "k_proj": kv_heads}.get(key.split(".")[-2])
            writer.add_tensor(name, _for_llama_cpp(tensor, permuted).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    ids = dict(tokenizer["model"]["vocab"]) | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    by_id = {index: token for token, index in ids.items()}
    strings = [by_id.get(index, f"<pad{index}>") for index in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(strings)
    writer.add_token_types([3 if index in special or index not in by_id else 1 for index in range(len(strings))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["pad_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )


def _gguf_name(key: str) -> str:
    parts = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{y}" for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers.": "blk."}
    for ours, theirs in parts.items():
        key = key.replace(ours, theirs)
    return key


def _for_llama_cpp(tensor: Tensor, heads: int | None) -> np.ndarray:
    """Queries and keys with the two halves of each head's rows interleaved."""
    rows = tensor.numpy()
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
