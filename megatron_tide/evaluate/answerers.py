"""Models that answer prompts, chosen by model type: block diffusion (student, teacher) and plain autoregressive.

All of them take prompts in ids and give text, draw prompt n from ``seed + n``, and stop at their end of text, so that a
benchmark does not know which one it asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.evaluate.presets import Preset
from megatron_tide.files import read_json
from megatron_tide.generate import complete
from megatron_tide.models import resolve_folder

Prompts = Sequence[np.ndarray]


@dataclass(frozen=True)
class Answer:
    """Text without special tokens, its number of tokens, and whether its end of text came."""

    text: str
    tokens: int
    finished: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Answerer(Protocol):
    """What benchmarks ask."""

    @property
    def model(self) -> Any:
        """The module that answers."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer."""

    def settings(self, preset: Preset) -> dict[str, Any]:
        """What decides an answer beside weights, prompt and seed."""

    def answer(self, prompts: Prompts, preset: Preset, *, seed: int, batch_size: int) -> list[Answer]:
        """Answers in the order of the prompts."""


@dataclass(frozen=True)
class BlockAnswerer:
    """A model that decodes in blocks: the student, LLaDA2."""

    model: Any
    tokenizer: TextTokenizer

    def settings(self, preset: Preset) -> dict[str, Any]:
        # A model decodes in the blocks it was trained in; the paper's were all trained in the preset's.
        return {
            "decoder": "block diffusion",
            "block_size": getattr(self.model.config, "block_size", None) or preset.block_size,
            "max_new_tokens": preset.new_tokens,
            "steps": preset.steps,
            "temperature": preset.temperature,
        }

    def answer(self, prompts: Prompts, preset: Preset, *, seed: int, batch_size: int) -> list[Answer]:
        knobs = {name: value for name, value in self.settings(preset).items() if name != "decoder"}
        found = complete(self.model, self.tokenizer, prompts, batch_size=batch_size, seed=seed, **knobs)
        return [Answer(one.text, len(one.ids), one.finished) for one in found]


@dataclass(frozen=True)
class AutoregressiveAnswerer:
    """A Qwen3 that writes one token after the other, by transformers' own ``generate``: the baseline of the paper."""

    model: Any
    tokenizer: TextTokenizer

    def settings(self, preset: Preset) -> dict[str, Any]:
        return {
            "decoder": "autoregressive",
            "max_new_tokens": preset.new_tokens,
            "temperature": preset.temperature,
        }

    @property
    def ends(self) -> list[int]:
        """Ids that end an answer: those of both configs and of the tokenizer."""
        named = [self.model.config.eos_token_id, self.model.generation_config.eos_token_id, self.tokenizer.eos_id]
        flat = [index for ids in named if ids is not None for index in (ids if isinstance(ids, list) else [ids])]
        return sorted(set(flat))

    @torch.no_grad()
    def answer(self, prompts: Prompts, preset: Preset, *, seed: int, batch_size: int) -> list[Answer]:
        answers: dict[int, Answer] = {}
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            written = self._write([prompts[place] for place in places], preset, [seed + place for place in places])
            answers |= dict(zip(places, (self._read(ids) for ids in written)))
        return [answers[place] for place in range(len(prompts))]

    def _write(self, prompts: Prompts, preset: Preset, seeds: list[int]) -> list[list[int]]:
        """Ids behind each prompt, padded ones included. Prompts are padded on the left: all go on at the same slot."""
        from transformers import GenerationConfig, LogitsProcessorList

        length, pad = max(len(prompt) for prompt in prompts), self.tokenizer.pad_id
        ids_BL = torch.full((len(prompts), length), pad)
        for row, prompt in enumerate(prompts):
            ids_BL[row, length - len(prompt) :] = torch.as_tensor(np.asarray(prompt), dtype=torch.int64)
        start_B = torch.tensor([length - len(prompt) for prompt in prompts])
        keep_BL = torch.arange(length) >= start_B.unsqueeze(1)
        rule = GenerationConfig(
            max_new_tokens=preset.new_tokens, do_sample=False, eos_token_id=self.ends, pad_token_id=pad
        )
        draws = LogitsProcessorList([_Draw(preset.temperature, seeds)] if preset.temperature else [])
        device = self.model.device
        kept = self.model.generation_config
        self.model.generation_config = rule  # or the checkpoint's own top-k and temperature come in again
        try:
            written = self.model.generate(
                ids_BL.to(device), attention_mask=keep_BL.long().to(device), logits_processor=draws
            )
        finally:
            self.model.generation_config = kept
        return written[:, length:].tolist()

    def _read(self, ids: list[int]) -> Answer:
        ends = set(self.ends)
        count = next((place + 1 for place, index in enumerate(ids) if index in ends), len(ids))
        return Answer(self.tokenizer.decode(ids[:count]), count, ids[count - 1] in ends)


class _Draw:
    """A logits processor after which the likeliest token is a draw from softmax(logits / temperature) (Gumbel-max).

    Every row draws from a generator of its own, so a text does not depend on the rows beside it.
    """

    def __init__(self, temperature: float, seeds: list[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, _: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        size = scores_BV.shape[1]
        noise_BV = torch.stack([torch.empty(size).exponential_(generator=one) for one in self._generators])
        return scores_BV.float() / self._temperature - noise_BV.log().to(scores_BV.device)


OpenModel = Callable[[str, torch.dtype, str], Any]


def _open_blocks(path: str, dtype: torch.dtype, device: str, open_model: OpenModel) -> Answerer:
    opened = open_model(path, dtype, device)
    return BlockAnswerer(opened.model, load_tokenizer(opened.folder))


def _open_autoregressive(path: str, dtype: torch.dtype, device: str, _: OpenModel) -> Answerer:
    from transformers import Qwen3ForCausalLM

    folder = resolve_folder(path)
    try:
        loaded: Any = Qwen3ForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as a Qwen3 model ({str(error).strip().splitlines()[0]})") from None
    model, found = loaded
    wrong = sorted(str(name) for names in found.values() for name in names)
    if wrong:  # transformers fills in what is missing with random numbers
        raise ValueError(f"{path}: its tensors are not those of the Qwen3 that config.json describes ({wrong[0]}, ...)")
    return AutoregressiveAnswerer(model.to(device).eval(), load_tokenizer(folder))


# A checkpoint of the trainer has no config.json of its own: it is a student.
ANSWERERS: dict[str | None, Callable[[str, torch.dtype, str, OpenModel], Answerer]] = {
    None: _open_blocks,
    "a2d-qwen3": _open_blocks,
    "llada2_moe": _open_blocks,
    "wedlm": _open_blocks,
    "qwen3": _open_autoregressive,
}


def model_type(path: str | Path) -> str | None:
    """``model_type`` of a hub-format folder or hub name; None for a checkpoint of the trainer."""
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        return None
    return str(read_json(resolve_folder(path) / "config.json").get("model_type"))


def check_has_bound(path: str | Path) -> None:
    """Raises: ValueError for an autoregressive model, whose likelihood is no diffusion bound."""
    if ANSWERERS.get(model_type(path)) is _open_autoregressive:
        raise ValueError(
            f"{path}: an autoregressive model (model_type qwen3) has no diffusion bound; leave out likelihood, "
            "or name it with --student if its weights are a diffusion model's"
        )


def open_answerer(path: str, dtype: torch.dtype, device: str, open_model: OpenModel) -> Answerer:
    """The answerer of a model; ``open_model`` opens all but autoregressive ones (``release.open_model``).

    Raises:
        ValueError: no model there, or of a type that cannot answer.
    """
    kind = model_type(path)
    if kind not in ANSWERERS:
        known = ", ".join(sorted(name for name in ANSWERERS if name))
        raise ValueError(f"{path}: model_type {kind!r} cannot be asked; known are {known}")
    return ANSWERERS[kind](path, dtype, device, open_model)


def model_fingerprint(answerer: Answerer) -> str:
    """sha256 hex of what answers: the weights as they are in memory, the config, the tokenizer and its template."""
    model, tokenizer = answerer.model, answerer.tokenizer
    digest = hashlib.sha256()
    identity = [type(model).__name__, tokenizer.fingerprint, tokenizer.template_fingerprint]
    digest.update(json.dumps(identity).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
