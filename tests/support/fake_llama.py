"""The functions of llama-cpp-python that block decoding calls, as its documentation describes them, over torch.

For machines without the package: what our side of the binding does (batches, positions, what stays in the cache, which
rows of logits are whose) is tested there as well. It reads the file's tensors with ``gguf`` and keeps to llama.cpp's
rules: a batch has at most ``n_batch`` tokens, a sequence goes on at the position after its last one, what is in the
cache attends to nothing that came later, and logits are those of the flagged tokens alone, until the next batch.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_tide.models.a2d_qwen3 import A2DQwen3LMHeadModel
from megatron_tide.models.gguf_release import read_release, tensor_name


class _Text(ctypes.Union):
    _fields_ = [("val_i64", ctypes.c_int64), ("val_str", ctypes.c_char * 128)]


class _Override(ctypes.Structure):
    _fields_ = [("tag", ctypes.c_int), ("key", ctypes.c_char * 128), ("value", _Text)]


class _Cache:
    """Keys and values [1, heads, K, D] of each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, ...]:
        before = self.layers.get(layer, (key[:, :, :0], value[:, :, :0]))
        self.layers[layer] = tuple(torch.cat(pair, 2) for pair in zip(before, (key, value)))
        return self.layers[layer]

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def cut(self, length: int) -> None:
        self.layers = {layer: tuple(one[:, :, :length] for one in pair) for layer, pair in self.layers.items()}


def _model(path: bytes, how: Any) -> Any:
    import gguf

    hidden = how.kv_overrides[0]
    assert (hidden.key, hidden.value.val_str, how.kv_overrides[1].key) == (b"tokenizer.ggml.model", b"no_vocab", b"")
    config, _ = read_release(Path(path.decode()))
    stored = {one.name: one for one in gguf.GGUFReader(path.decode()).tensors}
    model = A2DQwen3LMHeadModel(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            one = stored[tensor_name(key)]
            weight.copy_(torch.tensor(gguf.dequantize(one.data, one.tensor_type)).view(weight.shape))
    return model.eval()


def _context(model: Any, how: Any) -> Any:
    return SimpleNamespace(model=model, how=how, cache=_Cache(), causal=True, logits=None)


def _set_causal(context: Any, causal: bool) -> None:
    context.causal = causal


def _remove(context: Any, sequence: int, start: int, end: int) -> bool:
    assert (sequence, end) == (0, -1)
    context.cache.cut(start)
    return True


@torch.no_grad()
def _decode(context: Any, batch: Any) -> int:
    count, seen = batch.n_tokens, context.cache.get_seq_length()
    assert 0 < count <= context.how.n_batch
    if seen + count > context.how.n_ctx:
        return 1
    places = list(range(count))
    if [batch.pos[place] for place in places] != [seen + place for place in places]:
        return -1
    assert all(batch.n_seq_id[place] == 1 and batch.seq_id[place][0] == 0 for place in places)
    ids = torch.tensor([[batch.token[place] for place in places]])
    mask = torch.ones(count, seen + count, dtype=torch.bool).tril(seen)[None, None] if context.causal else None
    hidden = context.model.backbone(ids, mask, past_key_values=context.cache)[0]
    wanted = torch.tensor([bool(batch.logits[place]) for place in places])
    context.logits = context.model.lm_head(hidden[wanted]).numpy()
    return 0


def fake_llama_cpp() -> ModuleType:
    """A module to stand in ``sys.modules`` as ``llama_cpp``."""
    module: Any = ModuleType("llama_cpp")
    module.__spec__ = ModuleSpec("llama_cpp", None)
    module.GGML_TYPE_F32, module.LLAMA_FLASH_ATTN_TYPE_DISABLED, module.LLAMA_KV_OVERRIDE_TYPE_STR = 0, 0, 3
    module.llama_model_kv_override, module.llama_batch = _Override, SimpleNamespace
    module.llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    module.llama_model_default_params = module.llama_context_default_params = SimpleNamespace
    module.llama_log_set = module.llama_backend_init = module.llama_free = module.llama_model_free = lambda *_: None
    module.llama_model_load_from_file, module.llama_init_from_model = _model, _context
    module.llama_model_get_vocab = module.llama_get_memory = lambda of: of
    module.llama_vocab_n_tokens = lambda model: model.config.vocab_size
    module.llama_set_causal_attn, module.llama_memory_seq_rm, module.llama_decode = _set_causal, _remove, _decode
    module.llama_get_logits = lambda context: context.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return module
