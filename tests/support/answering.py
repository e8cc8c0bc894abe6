"""Models to evaluate in tests: a tiny autoregressive Qwen3 on disk, and a generator that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.model import LM
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_tide.bridge import load_tokenizer
from megatron_tide.evaluate.generators import Generator
from megatron_tide.evaluate.thoughts import cut


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


class Scripted(Generator, LM):
    """Answers ``script(prompt)``, one prompt at a time; ``asked`` collects the prompts."""

    decoder = "scripted"

    def __init__(self, folder: Path, script: Callable[[str], str]) -> None:
        super().__init__()
        self.model, self.folder = torch.nn.Linear(1, 1), folder
        self.model.config = SimpleNamespace()
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.text_tokenizer, self.script = load_tokenizer(folder), script
        self.asked: list[str] = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            prompt, settings = request.args
            self.asked.append(prompt)
            texts.append(cut(self.script(prompt), settings["until"], prompt))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError
