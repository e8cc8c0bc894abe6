"""Models as lm-eval sees them: block diffusion (ours) and autoregressive (lm-eval's HFLM). Imports lm-eval.

Both take the same prompt strings and return text cut at the task's stop strings. What decides an answer is in the
request itself (prompt and generation settings) and in the model's fingerprint: the two together are the cache key.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM, CachingLM, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from safetensors import SafetensorError
from sqlitedict import SqliteDict
from tqdm import tqdm

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.files import read_json
from megatron_tide.generate import complete
from megatron_tide.models import resolve_folder
from megatron_tide.training_checkpoint import generation_of, open_model

THINKING = ("<think>", "</think>")


class Generator:
    """What both kinds share: prompts through the project's tokenizer, generation settings, a fingerprint."""

    decoder: str
    model: Any
    text_tokenizer: TextTokenizer
    thinking: bool | None = None
    """What a chat template is told of ``enable_thinking``; None for nothing, as in training."""
    folder: Path
    """Where config and tokenizer are."""

    def settings(self, preset: BenchmarkPreset) -> dict[str, Any]:
        """Generation settings, with lm-eval's names; each request carries them."""
        return {"max_new_tokens": preset.new_tokens, "temperature": preset.temperature}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained on it, up to its answer or through the start of its answer."""
        names: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        if add_generation_prompt:
            return self.text_tokenizer.render(chat_history, **names)
        # Templates differ in how they leave an answer open, so the start is appended here. A start that begins with a
        # space loses the one at its end, as in transformers' continue_final_message.
        start = chat_history[-1]["content"]
        start = start.rstrip() if start[:1].isspace() else start
        return self.text_tokenizer.render(chat_history[:-1], start=start, **names)

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of weights (as they are in memory), config files, tokenizer and chat template."""
        tokenizer, digest = self.text_tokenizer, hashlib.sha256()
        files = [self.folder / name for name in ("config.json", "generation_config.json")]
        configs = [read_json(file) if file.is_file() else None for file in files]
        identity = [type(self.model).__name__, configs, tokenizer.fingerprint, tokenizer.template_fingerprint]
        digest.update(json.dumps(identity, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()


class BlockDiffusionGenerator(Generator, LM):
    """A model that decodes block by block. It generates; it has a bound in place of a likelihood of given text."""

    decoder = "block diffusion"

    def __init__(self, model: Any, tokenizer: TextTokenizer, folder: Path, batch_size: int) -> None:
        super().__init__()
        self.model, self.text_tokenizer, self.folder, self.batch_size = model, tokenizer, folder, batch_size

    def settings(self, preset: BenchmarkPreset) -> dict[str, Any]:
        # A model decodes in the blocks it was trained with; the paper's models were all trained with the preset's.
        block_size = getattr(self.model.config, "block_size", None) or preset.block_size
        stated = {"block_size": block_size, "block_layout": preset.block_layout, "steps": preset.steps}
        return {**super().settings(preset), **stated}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests, each cut before its first stop string.

        Longest prompts first, in batches; a batch is in the cache before the next one starts. The order depends on the
        prompts alone, so a continued evaluation runs the batches of an uninterrupted one.
        """
        texts: dict[int, str] = {}
        ids = [self._encode(*request.args) for request in requests]
        order = sorted(range(len(requests)), key=lambda n: (-len(ids[n]), requests[n].args[0]))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating answers") as bar:
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                for number, text in zip(batch, self._complete([ids[n] for n in batch], [requests[n] for n in batch])):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _encode(self, prompt: str, settings: dict[str, Any]) -> np.ndarray:
        """Special tokens are recognised in what a chat template rendered, and not in plain text."""
        tokenizer = self.text_tokenizer
        return tokenizer.encode_prompt(prompt) if settings["chat_template"] else tokenizer.encode(prompt)

    def _complete(self, prompts: Sequence[np.ndarray], requests: Sequence[Any]) -> list[str]:
        names = ("max_new_tokens", "temperature", "block_size", "block_layout", "steps")
        settings = {name: requests[0].args[1][name] for name in names}
        seeds = [_seed(*request.args) for request in requests]
        found = complete(
            self.model, self.text_tokenizer, prompts, batch_size=len(prompts), seed=seeds, progress=None, **settings
        )
        return [cut(one.text, request.args[1]["until"]) for one, request in zip(found, requests)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise ValueError(
            f"task {requests[0].task_name} compares likelihoods, which a diffusion model does not have; take a task "
            "that generates (output_type generate_until), or --tasks likelihood for the diffusion bound"
        )

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise ValueError(
            f"task {requests[0].task_name} measures perplexity, which a diffusion model does not have; --tasks "
            "likelihood measures its bound in bits per byte"
        )


class AutoregressiveGenerator(Generator, HFLM):
    """Any causal language model of transformers, through lm-eval's own model: the baseline of the paper."""

    decoder = "autoregressive"
    thinking = False

    def __init__(self, model: Any, tokenizer: TextTokenizer, folder: Path, batch_size: int) -> None:
        from transformers import GenerationConfig

        named = [model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_id]
        ends = {index for ids in named if ids is not None for index in (ids if isinstance(ids, list) else [ids])}
        # In place of the checkpoint's own: its top-k, top-p and temperature would apply.
        model.generation_config = GenerationConfig(eos_token_id=sorted(ends))
        self.text_tokenizer, self.folder = tokenizer, folder
        self._thinks = THINKING[1] in tokenizer.raw.get_vocab() or THINKING[1] in str(tokenizer.raw.chat_template)
        super().__init__(model, backend="causal", tokenizer=tokenizer.raw, batch_size=batch_size)

    def tok_encode(self, string: str, *args: Any, left_truncate_len: int | None = None, **kwargs: Any) -> list[int]:
        """As lm-eval does it, but message text that reads like a control token stays text."""
        if not getattr(string, "content", ()):
            return super().tok_encode(string, *args, left_truncate_len=left_truncate_len, **kwargs)
        before = [] if has_bos_prefix(string, self.tokenizer.bos_token) else self.tokenizer("")["input_ids"]
        return [*before, *self.text_tokenizer.encode_prompt(string).tolist()][-(left_truncate_len or 0) :]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not any(getattr(string, "content", ()) for string in strings):
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **kwargs)
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        own = {name: settings.pop(name, None) for name in ("chat_template", "seed", "sample")}
        if self._thinks:  # a stop string in its thoughts ends nothing; ``tok_decode`` drops them
            stop = [self.tok_decode(self.eot_token_id, skip_special_tokens=False)]
        if settings.get("do_sample"):
            settings |= {"top_k": 0, "top_p": 1.0}  # draw from the whole distribution
        with torch.random.fork_rng():
            torch.manual_seed(_seed(context.tolist(), own))
            return super()._model_generate(context, max_length, stop, **settings)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        text = super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)
        return without_thoughts(text) if skip_special_tokens else text


def _seed(*request: Any) -> int:
    """Random seed of an answer: depends on the request's content, not on its position in the list."""
    return int(hash_args("seed", request)[:8], 16)


def without_thoughts(text: str) -> str:
    """The answer behind ``<think>...</think>``; empty where a model was still thinking when its tokens ran out."""
    _, end, answer = text.rpartition(THINKING[1])
    return answer.lstrip("\n") if end else "" if text.lstrip().startswith(THINKING[0]) else text


def cut(text: str, stops: Sequence[str]) -> str:
    """The answer, without thoughts, before the first of ``stops``; all of it where none occurs."""
    text = without_thoughts(text)
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def _open_autoregressive(path: str, dtype: torch.dtype, device: str, batch_size: int) -> Generator:
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a causal language model ({reason})") from None
    model, found = loaded
    wrong = sorted(str(name) for names in found.values() for name in names)
    if wrong:  # transformers fills in what is missing with random numbers
        raise ValueError(f"{path}: its tensors are not those of the model that config.json describes ({wrong[0]}, ...)")
    return AutoregressiveGenerator(model.to(device), load_tokenizer(folder), folder, batch_size)


def open_generator(
    path: str, dtype: torch.dtype, device: str, batch_size: int, thinking: bool | None = None
) -> Generator:
    """The generator of a folder in hub format, a hub name, or a checkpoint of the trainer.

    ``thinking``: whether a chat template that knows ``enable_thinking`` lets the model think before it answers; None:
    an autoregressive model does not, others are prompted as they were trained.

    Raises:
        ValueError: no model there, or of a type that cannot generate.
    """
    if batch_size < 1:
        raise ValueError(f"evaluate: batch size {batch_size}; give 1 or more")
    if generation_of(path) == "autoregressive":
        generator = _open_autoregressive(path, dtype, device, batch_size)
    else:
        opened = open_model(path, dtype, device)
        generator = BlockDiffusionGenerator(opened.model, load_tokenizer(opened.folder), opened.folder, batch_size)
    if thinking is not None:
        generator.thinking = thinking
    return generator


class ResponseCache(CachingLM):
    """lm-eval's response cache, its values as JSON: reading a cache runs no code, as unpickling could.

    Raises:
        ValueError: the file is not such a cache.
    """

    def __init__(self, lm: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(path)) as database:
                database.execute("pragma schema_version")
        except sqlite3.Error as error:
            raise ValueError(f"{path}: not a response cache ({error}); remove it to start again") from None
        self.dbdict = SqliteDict(str(path), autocommit=True, encode=json.dumps, decode=json.loads)
        self.lm, self.cache_db = lm, str(path)
        lm.set_cache_hook(self.get_cache_hook())

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.dbdict.close()
