"""A student in a GGUF file, run by llama.cpp (llama-cpp-python): a model as block decoding takes it.

llama.cpp knows nothing of blocks. With causal attention switched off, one batch of tokens attends to the cache and to
all of itself: a batch is a block, after those before it. What a pass did not commit is taken out of the cache before
the next one, so keys and values of finished blocks are computed once and never change. Prompts go in block by block.
The file's vocabulary is not given to llama.cpp: text becomes tokens here, under the guards of ``TextTokenizer``.

Shapes: Q queries, K keys, R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_tide.gguf_header import FLOAT32
from megatron_tide.models.decoding_a2d import BlockCache
from megatron_tide.models.gguf_release import read_release

_LONGEST_BLOCK = 2048  # more is no block, and would take gigabytes for logits
_said: list[str] = []  # errors of llama.cpp


class Llama:
    """One file and one sequence in llama.cpp. ``gpu``: it runs where llama.cpp was built for, else on the CPU.
    ``batch``: tokens of a batch at most. ``exact``: keys and values in fp32, else in fp16.

    Raises:
        ValueError: no llama-cpp-python, or a file that it cannot load.
    """

    def __init__(self, file: Path, *, gpu: bool, batch: int, exact: bool) -> None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise ValueError(f"{file}: needs llama-cpp-python; pip install -r requirements-gguf.txt")
        import llama_cpp

        self._cpp: Any = llama_cpp
        self.version = str(getattr(llama_cpp, "__version__", ""))
        llama_cpp.llama_log_set(_keep_errors(llama_cpp), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.n_gpu_layers = -1 if gpu else 0
        how.use_extra_bufts = False  # its AMX kernels crash on some shapes
        hides = (llama_cpp.llama_model_kv_override * 2)()  # the second one, empty, ends the list
        hides[0].tag, hides[0].key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, b"tokenizer.ggml.model"
        hides[0].value.val_str = b"no_vocab"
        how.kv_overrides = hides
        _said.clear()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), how)
        if not self._model:
            raise ValueError(f"{file}: llama.cpp cannot load it ({_reason()}); write it again")
        self._contexts: list[Any] = []
        weakref.finalize(self, _free, llama_cpp, self._model, self._contexts)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._file, self._batch, self._exact, self._room = file, batch, exact, 0

    @property
    def _context(self) -> Any:
        return self._contexts[-1]

    def reserve(self, tokens: int, *, causal: bool = False) -> None:
        """An empty cache for ``tokens``. ``causal``: a token attends to those before it only."""
        if tokens > self._room:
            while self._contexts:
                self._cpp.llama_free(self._contexts.pop())
            how = self._cpp.llama_context_default_params()
            how.n_ctx, how.n_batch, how.n_ubatch = tokens, self._batch, self._batch
            how.n_threads = how.n_threads_batch = torch.get_num_threads()
            if self._exact:
                how.type_k = how.type_v = self._cpp.GGML_TYPE_F32
                how.flash_attn_type = self._cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it works in fp16
            _said.clear()
            context = self._cpp.llama_init_from_model(self._model, how)
            if not context:
                raise ValueError(f"{self._file}: llama.cpp has no memory for {tokens} tokens ({_reason()})")
            self._contexts.append(context)
            self._room = tokens
        self._cpp.llama_set_causal_attn(self._context, causal)
        self.forget(0)

    def forget(self, start: int) -> None:
        """Take the tokens from position ``start`` on out of the cache."""
        self._cpp.llama_memory_seq_rm(self._cpp.llama_get_memory(self._context), 0, start, -1)

    def decode(self, tokens_Q: np.ndarray, positions_Q: np.ndarray, wanted_Q: np.ndarray) -> np.ndarray:
        """One batch after what is in the cache, which keeps it; logits of the ``wanted_Q`` tokens, fp32 [R, V]."""
        count, rows = len(tokens_Q), int(wanted_Q.sum())
        if count > self._batch:
            raise ValueError(f"{self._file}: a block of {count} tokens; those of this file have {self._batch}")
        columns = (tokens_Q.astype(np.int32), positions_Q.astype(np.int32), np.ones(count, np.int32))
        one = (ctypes.c_int32 * 1)(0)
        sequences: Any = (ctypes.POINTER(ctypes.c_int32) * count)()
        sequences[:] = [one] * count
        flags = wanted_Q.astype(np.int8)
        token, place, number = (column.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for column in columns)
        batch = self._cpp.llama_batch(
            n_tokens=count,
            token=token,
            embd=None,
            pos=place,
            n_seq_id=number,
            seq_id=sequences,
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        _said.clear()
        if status := self._cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"{self._file}: llama.cpp stops with {status} ({_reason()})")
        if not rows:
            return np.empty((0, self.vocab), np.float32)
        return np.ctypeslib.as_array(self._cpp.llama_get_logits(self._context), (rows, self.vocab)).copy()


class GgufModel:
    """The student of a file that ``convert-gguf`` wrote, for ``BlockDecoder``: one prompt at a time.

    ``backbone`` runs the layers and the head; its "hidden state" of a position is the number of its row of logits.
    Only mask tokens have one.
    """

    rows_at_once = 1
    head_weight = torch.empty(0)  # block decoding works on its device

    def __init__(self, file: Path, *, gpu: bool = False) -> None:
        self.file = file
        self.config, header = read_release(file)
        block = self.config.block_size
        if block > _LONGEST_BLOCK:
            raise ValueError(f"{file}: blocks of {block} tokens; up to {_LONGEST_BLOCK} are supported")
        self.llama = Llama(file, gpu=gpu, batch=block, exact=header.tensors["token_embd.weight"].kind == FLOAT32)
        self._logits_RV = torch.empty(0)
        self._cache: Any = lambda: None

    def backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, past_key_values: BlockCache
    ) -> Tensor:
        """Numbers of rows [1, Q, 1] for ``head``, -1 where the token is no mask.

        ``attention_mask`` (bool [1, 1, Q, K]) says which queries are a block: they see up to the same key.
        """
        assert len(input_ids) == 1, "one prompt at a time"
        begin = past_key_values.length
        if begin == 0:
            self.llama.reserve(past_key_values.capacity)
            self._cache = weakref.ref(past_key_values)
        assert self._cache() is past_key_values, "another decoder uses this file"
        self.llama.forget(begin)
        tokens_Q, positions_Q = input_ids[0].numpy(), position_ids[0].numpy()
        wanted_Q = tokens_Q == self.config.mask_token_id
        numbers_Q, found = np.full(len(tokens_Q), -1), []
        for block in _blocks(attention_mask, begin, len(tokens_Q)):
            found.append(self.llama.decode(tokens_Q[block], positions_Q[block], wanted_Q[block]))
            numbers_Q[block][wanted_Q[block]] = np.arange(len(found[-1])) + sum(map(len, found[:-1]))
        self._logits_RV = torch.from_numpy(np.concatenate(found))
        return torch.from_numpy(numbers_Q)[None, :, None]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of the last pass, by what ``backbone`` returned [R, 1]."""
        return self._logits_RV[hidden[:, 0]]


def _blocks(mask: Tensor | None, begin: int, count: int) -> list[slice]:
    """The queries of each block. Those that nothing attends to, behind the last one, are in none."""
    if mask is None:
        return [slice(0, count)]
    ends_Q = mask[0, 0].int().cumprod(-1).sum(-1) - begin  # the first key that a query does not see
    blocks, start = list[slice](), 0
    while start < count and ends_Q[start] > start:
        blocks.append(slice(start, int(ends_Q[start])))
        start = blocks[-1].stop
    return blocks


def _free(cpp: Any, model: Any, contexts: list[Any]) -> None:
    for context in contexts:
        cpp.llama_free(context)
    cpp.llama_model_free(model)


_callbacks: list[Any] = []


def _keep_errors(cpp: Any) -> Any:
    """llama.cpp's log goes nowhere but for its errors, which are kept for a message."""

    def hear(level: int, text: bytes, _: Any) -> None:
        if level == 4:
            _said.append(text.decode("utf-8", "replace"))

    if not _callbacks:
        _callbacks.append(cpp.llama_log_callback(hear))
    return _callbacks[0]


def _reason() -> str:
    return " ".join("".join(_said[-2:]).split())[:300] or "it says nothing"
