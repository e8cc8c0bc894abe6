"""Models as lm-eval sees them: block diffusion (ours) and autoregressive (lm-eval's HFLM). Imports lm-eval.

Both take the same prompt strings and return text cut at the task's stop strings. What decides an answer is in the
request itself (prompt and generation settings) and in the model's fingerprint: the two together are the cache key.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM, hash_args
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.bridge.changes import first_change
from megatron_tide.bridge.chat import Rendered
from megatron_tide.cli import say
from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.evaluate.thoughts import Answer, closed, cut, text_of, without_thoughts
from megatron_tide.files import fingerprint
from megatron_tide.generate import complete
from megatron_tide.generate.copies import shared
from megatron_tide.generate.identity import code, identity
from megatron_tide.models.autoregressive import end_tokens, load_autoregressive, most_rows, only_numbers
from megatron_tide.models.families import family_of
from megatron_tide.models.load import stated_layout
from megatron_tide.training_checkpoint import generation_of, open_model

_CODE = ("evaluate/generators.py", "evaluate/thoughts.py")
Written = tuple[Sequence[int], int]
"""The ids of an answer, and the forward passes that it took."""
CHANGED = "had a prompt with text that the tokenizer changes before the model reads it"
LOST = "had a prompt that exceeds the model's context: its beginning was left out"


class Generator:
    """What both kinds share: prompts through the project's tokenizer, generation settings, a fingerprint."""

    decoder: str
    model: Any
    copies: Sequence[Any] = ()
    """On other GPUs; they take a share of the batches."""
    text_tokenizer: TextTokenizer
    thinking: bool | None = None
    """What a chat template is told of ``enable_thinking``; None for nothing, as in training."""
    folder: Path
    """Where config and tokenizer are."""
    batch_size: Any
    cache_hook: Any

    def settings(self, preset: BenchmarkPreset) -> dict[str, Any]:
        """Generation settings, with lm-eval's names; each request carries them."""
        return {"max_new_tokens": preset.new_tokens, "temperature": preset.temperature}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        found = self._rendered(chat_history, add_generation_prompt)
        if any(self._changes(message["content"]) for message in chat_history):
            self._changed.add(found)
        return found

    def _rendered(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The conversation as the model was trained on it, up to its answer or through the start of its answer.

        A start stands behind the thoughts: where the template opens some, they are left empty.
        """
        names: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        if add_generation_prompt:
            return self.text_tokenizer.render(chat_history, **names)
        # Templates differ in how they leave an answer open, so the start is appended here. A start that begins with a
        # space loses the one at its end, as in transformers' continue_final_message.
        start = chat_history[-1]["content"]
        start = start.rstrip() if start[:1].isspace() else start
        return closed(self.text_tokenizer.render(chat_history[:-1], **names)) + start

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests, each without thoughts and cut before its first stop string.

        Longest prompts first, in batches; a batch is in the cache before the next one starts. The order depends on the
        prompts alone, so a continued evaluation runs the batches of an uninterrupted one.
        """
        texts: dict[int, Answer] = {}
        ids = [self.encode(*request.args) for request in requests]
        groups: dict[str, list[int]] = {}  # tasks of a group may have other settings each
        for n in sorted(range(len(requests)), key=lambda n: (-len(ids[n]), requests[n].args[0])):
            settings = {name: value for name, value in requests[n].args[1].items() if name != "until"}
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(n)
        size = self.batch_size
        batches = [order[first : first + size] for order in groups.values() for first in range(0, len(order), size)]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating answers") as bar:
            for batch, answers in zip(batches, self._completed(batches, ids, requests)):
                for n, (found, passes) in zip(batch, answers):
                    prompt, settings = requests[n].args
                    stops = settings["until"]
                    text = cut(text_of(self.text_tokenizer, found, stops), stops, prompt)
                    lost = (LOST,) if len(ids[n]) > self.room(settings) else ()
                    seen = prompt in self._changed if settings["chat_template"] else self._changes(prompt)
                    changed = (CHANGED,) if seen else ()
                    texts[n] = Answer(text, (*text.notes, *lost, *changed), len(found), passes)
                    self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
                bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    @cached_property
    def _changed(self) -> set[str]:
        """Rendered conversations with text that the tokenizer changes."""
        return set()

    def _changes(self, text: str) -> bool:
        return bool(first_change(self.text_tokenizer, [text]))

    def encode(self, prompt: str, settings: dict[str, Any]) -> np.ndarray:
        """Special tokens are recognised in what a chat template rendered, and not in plain text."""
        if settings["chat_template"] and not isinstance(prompt, Rendered):
            raise ValueError(
                "a task changed its prompt after the chat template rendered it, so that control tokens cannot be told "
                "from text; add --no-chat-template"
            )
        tokenizer = self.text_tokenizer
        return tokenizer.encode_prompt(prompt) if settings["chat_template"] else tokenizer.encode(prompt)

    def room(self, settings: dict[str, Any]) -> float:
        """The most tokens of a prompt."""
        return float("inf")

    def _completed(
        self, batches: Sequence[list[int]], ids: Sequence[np.ndarray], requests: Sequence[Any]
    ) -> Iterator[list[Written]]:
        """The answers of each batch, in order; copies of the model share the batches."""

        def work(model: Any, batch: list[int]) -> list[Written]:
            return self._complete(model, [ids[n] for n in batch], [requests[n] for n in batch])

        return shared([self.model, *self.copies], work, batches)

    def _complete(self, model: Any, prompts: Sequence[np.ndarray], requests: Sequence[Any]) -> list[Written]:
        """The answers to a batch of prompts, by the model or a copy of it."""
        raise NotImplementedError

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the model's identity, what stands before a text and how long it may be, and the code from
        prompt to answer.
        """
        found = identity(self.model, self.folder, self.text_tokenizer)
        return fingerprint([*found, *self._beside(), self.room({"max_new_tokens": 0}), code(_CODE, ("lm_eval",))])

    def _beside(self) -> list[Any]:
        """What stands before a text."""
        return [self.encode("", {"chat_template": False}).tolist()]


class BlockDiffusionGenerator(Generator, LM):
    """A model that decodes block by block. It generates; it has a bound in place of a likelihood of given text."""

    decoder = "block diffusion"
    block_layout: str | None = None
    """Where blocks begin; None for the preset's."""

    def __init__(
        self, model: Any, tokenizer: TextTokenizer, folder: Path, batch_size: int, copies: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        self.model, self.text_tokenizer, self.folder, self.batch_size = model, tokenizer, folder, batch_size
        self.copies = copies

    def settings(self, preset: BenchmarkPreset) -> dict[str, Any]:
        # A model decodes in the blocks it was trained with; the paper's models were all trained with the preset's.
        block_size = getattr(self.model.config, "block_size", None) or preset.block_size
        layout = self.block_layout or preset.block_layout
        stated = {"block_size": block_size, "block_layout": layout, "steps": preset.steps}
        if preset.threshold is not None:
            stated["threshold"] = preset.threshold
        return {**super().settings(preset), **stated}

    def _complete(self, model: Any, prompts: Sequence[np.ndarray], requests: Sequence[Any]) -> list[Written]:
        names = ("max_new_tokens", "temperature", "block_size", "block_layout", "steps", "threshold")
        settings = {name: requests[0].args[1].get(name) for name in names}
        seeds = [_seed(*request.args) for request in requests]
        found = complete(
            model, self.text_tokenizer, prompts, batch_size=len(prompts), seed=seeds, progress=None, **settings
        )
        return [(one.ids, one.own_passes) for one in found]

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
    _draws = threading.Lock()

    def __init__(
        self, model: Any, tokenizer: TextTokenizer, folder: Path, batch_size: int, copies: Sequence[Any] = ()
    ) -> None:
        from transformers import GenerationConfig

        ends = end_tokens(model, tokenizer.eos_id)
        for one in (model, *copies):  # in place of the checkpoint's own: its top-k, top-p and temperature would apply
            one.generation_config = GenerationConfig(eos_token_id=ends)
        self.text_tokenizer, self.folder, self.copies = tokenizer, folder, copies
        super().__init__(model, backend="causal", tokenizer=tokenizer.raw, batch_size=most_rows(model, batch_size))

    def settings(self, preset: BenchmarkPreset) -> dict[str, Any]:
        # What is drawn depends on the batch.
        return {**super().settings(preset), **({"batch_size": self.batch_size} if preset.temperature else {})}

    def encode(self, prompt: str, settings: dict[str, Any]) -> np.ndarray:
        return np.array(self._with_before(super().encode(prompt, settings).tolist()), dtype=np.int64)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **more: Any
    ) -> list[int]:
        """For likelihoods, as lm-eval does it; but control tokens come from a chat template alone."""
        rendered = isinstance(string, Rendered)
        if not (string.content if isinstance(string, Rendered) else self.text_tokenizer.reads_like_control(string)):
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **more)
        encode = self.text_tokenizer.encode_prompt if rendered else self.text_tokenizer.encode
        ids = encode(string).tolist()
        return (ids if add_special_tokens is False else self._with_before(ids))[-(left_truncate_len or 0) :]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _with_before(self, ids: list[int]) -> list[int]:
        """``ids`` behind what the tokenizer writes before a text, such as the token of its beginning, if the chat
        template has not written that. What it writes behind one is no part of a prompt.
        """
        alone, whole = (self.tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
        before = whole[: next((n for n in range(len(whole)) if whole[n : n + len(alone)] == alone), 0)]
        return ids if ids[: len(before)] == before else [*before, *ids]

    def _beside(self) -> list[Any]:
        # A prompt that begins with its token of the beginning gets no other; likelihoods begin behind the prefix.
        return [*super()._beside(), self.tokenizer.bos_token, self.prefix_token_id]

    def room(self, settings: dict[str, Any]) -> float:
        return self.max_length - settings["max_new_tokens"]

    def _complete(self, model: Any, prompts: Sequence[np.ndarray], requests: Sequence[Any]) -> list[Written]:
        settings = requests[0].args[1]
        tokens, heat = settings["max_new_tokens"], settings["temperature"]
        room = int(self.room(settings))
        if room < 1:
            raise ValueError(
                f"{tokens} new tokens do not fit the model's context of {self.max_length}; lower --max-new-tokens"
            )
        rows = [prompt[-room:].tolist() for prompt in prompts]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
        context = padded["input_ids"]
        drawn = {"do_sample": True, "temperature": heat, "top_k": 0, "top_p": 1.0} if heat else {"do_sample": False}
        ends = _Answered(self.text_tokenizer, [(request.args[0], settings["until"]) for request in requests])
        own = {name: settings.get(name) for name in ("chat_template", "seed", "sample")}
        own |= {"repeat": settings["repeat"]} if "repeat" in settings else {}
        # What is drawn comes from torch's global state, so one batch draws at a time.
        with self._draws if heat else nullcontext(), torch.random.fork_rng() if heat else nullcontext():
            if heat:
                torch.manual_seed(_seed(context.tolist(), own))
            found = model.generate(
                **padded,
                max_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([ends]),
                logits_processor=LogitsProcessorList([only_numbers]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **drawn,
            )
        return [(row, len(row)) for row in found[:, context.shape[1] :].tolist()]  # a pass writes one token


class _Answered(StoppingCriteria):
    """Which answers of a batch have a stop string; one in thoughts does not count. ``asked``: prompt and stops."""

    def __init__(self, tokenizer: TextTokenizer, asked: Sequence[tuple[str, Sequence[str]]]) -> None:
        self._tokenizer, self._asked = tokenizer, asked
        self._written = [b""] * len(asked)
        self._done = [False] * len(asked)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self._done[row] = self._done[row] or self._has_stop(row, token)
        return torch.tensor(self._done, device=input_ids.device)

    def _has_stop(self, row: int, token: int) -> bool:
        prompt, stops = self._asked[row]
        piece = self._tokenizer.id_to_bytes(token) or text_of(self._tokenizer, [token], stops).encode()
        self._written[row] += piece
        near = self._written[row][-len(piece) - max(map(len, map(str.encode, stops)), default=0) :]
        if not any(stop and stop.encode() in near for stop in stops):
            return False
        answer = without_thoughts(self._written[row].decode(errors="replace"), prompt)
        return any(stop and stop in answer for stop in stops)


def _seed(*request: Any) -> int:
    """Random seed of an answer: depends on the request's content, not on its position in the list."""
    return int(hash_args("seed", request)[:8], 16)


def open_generator(
    path: str,
    dtype: torch.dtype,
    device: str,
    batch_size: int,
    thinking: bool | None = None,
    copies: Sequence[str] = (),
    block_layout: str | None = None,
) -> Generator:
    """The generator of a folder in hub format, a hub name, or a checkpoint of the trainer.

    ``thinking``: whether a chat template that knows ``enable_thinking`` lets the model think before it answers; None:
    an autoregressive model does not, others are prompted as they were trained. ``copies``: further devices, each with a
    copy of the model that takes a share of the batches. ``block_layout``: where blocks begin; None: as the folder or
    the model's family states, or else the preset.

    Raises:
        ValueError: no model there, or of a type that cannot generate.
    """
    if batch_size < 1:
        raise ValueError(f"evaluate: batch size {batch_size}; give 1 or more")
    if generation_of(path) == "autoregressive":
        model, folder = load_autoregressive(path, dtype, device)
        tokenizer = load_tokenizer(folder)
        if tokenizer.raw is None:
            raise ValueError(f"{path}: a baseline needs a tokenizer.json; save its tokenizer with transformers first")
        others = [load_autoregressive(path, dtype, other)[0] for other in copies]
        generator: Generator = AutoregressiveGenerator(model, tokenizer, folder, batch_size, others)
    else:
        opened = open_model(path, dtype, device)
        more = [open_model(path, dtype, other).model for other in copies]
        tokenizer = load_tokenizer(opened.folder)
        generator = BlockDiffusionGenerator(opened.model, tokenizer, opened.folder, batch_size, more)
        generator.block_layout = block_layout or stated_layout(opened.folder)
        generator.block_layout = generator.block_layout or family_of(opened.model).block_layout or None
    if thinking is not None:
        generator.thinking = thinking
        asked = [{"role": "user", "content": "x"}]
        if len({tokenizer.render(asked, enable_thinking=one) for one in (True, False)}) == 1:
            say(f"note: {path}: --thinking changes nothing, its template knows no enable_thinking", file=sys.stderr)
    return generator
