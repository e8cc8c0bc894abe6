"""Models to ask in tests: a tiny autoregressive Qwen3 on disk, and an answerer that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.evaluate.answerers import Answer
from megatron_tide.evaluate.presets import Preset


def write_autoregressive(folder: Path, tokenizer_from: Path, seed: int = 0) -> Path:
    """A two-layer Qwen3ForCausalLM with a tokenizer, written by transformers, with sampling defaults as public ones."""
    tokenizer = load_tokenizer(tokenizer_from)
    tokenizer.save(folder)
    config = Qwen3Config(
        vocab_size=-(-tokenizer.vocab_size // 16) * 16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # as initialised, a model of this size repeats its last token
        parameter.data.mul_(8)
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Scripted:
    """Answers ``script(prompt text)``; ``asked`` collects the prompts."""

    tokenizer: TextTokenizer
    script: Callable[[str], str]
    model: Any = field(default_factory=lambda: torch.nn.Linear(1, 1))
    asked: list[str] = field(default_factory=list)

    def settings(self, preset: Preset) -> dict[str, Any]:
        return {"decoder": "scripted", "max_new_tokens": preset.new_tokens}

    def answer(self, prompts: Sequence[np.ndarray], preset: Preset, *, seed: int, batch_size: int) -> list[Answer]:
        texts = [self.tokenizer.decode(ids, skip_special=False) for ids in prompts]
        self.asked.extend(texts)
        return [Answer(self.script(text), 1, True) for text in texts]
