"""Stage j: 256 tokens by block decoding, one a pass, and by transformers' greedy generation of the same shape.

Weights are random and no text ends early. The paper's table of one H100 stands beside: 6.25 s for the student, 32.55 s
for the teacher, 4.99 s for an autoregressive model of the student's size.
"""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.generate import autoregressive, autoregressive_model
from benchmarks.gpu_stages.bench import Bench
from benchmarks.gpu_stages.full import config_of, random_model
from benchmarks.gpu_stages.waits import watched

PUBLISHED_SECONDS = {"student": 6.25, "teacher": 32.55, "autoregressive": 4.99}
NEW, PROMPT = 256, 128


def run(bench: Bench) -> None:
    bench.note(published_seconds=PUBLISHED_SECONDS, new_tokens=new_tokens(bench))
    with bench.part("student"):
        config = config_of("student", bench.tiny)
        model = random_model(bench, config, torch.float32).to(torch.bfloat16).eval()
        for batch in (1, 2 if bench.tiny else 64):
            with bench.part(f"student, batch {batch}"):
                bench.note(**{f"student, batch {batch}": by_blocks(bench, model, config, batch)})
        with bench.part("without graphs"), patch.dict(os.environ, A2D_GRAPHS="0"):
            bench.note(**{"student, batch 1, without CUDA graphs": by_blocks(bench, model, config, 1)})
        with bench.part("autoregressive"):
            causal = autoregressive_model(model, config).to(bench.device)
            bench.note(autoregressive=by_tokens(bench, causal, config))
            del causal
        del model
    bench.clean()
    with bench.part("teacher"):
        config = config_of("teacher", bench.tiny)
        model = random_model(bench, config, torch.bfloat16).eval()
        bench.note(teacher=by_blocks(bench, model, config, 1))


def new_tokens(bench: Bench) -> int:
    return 32 if bench.tiny else NEW


def prompts(bench: Bench, config: dict[str, Any], batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = batch, 32 if bench.tiny else PROMPT
    return torch.randint(config["vocab_size"] - 3, shape, generator=generator).to(bench.device)


def by_blocks(bench: Bench, model: Any, config: dict[str, Any], batch: int) -> dict[str, Any]:
    """Seconds, of a pass in ms, and how often a pass waits for the device."""
    ids, block = prompts(bench, config, batch), config["block_size"]
    mask = config.get("mask_token_id") or config["vocab_size"] - 1
    fixed = {"block_size": block, "mask_token_id": mask, "pad_token_id": mask, "eos_token_id": ()}

    def generate(new: int) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=new, tokens_per_step=1, **fixed)

    generate(2 * block)  # compiles, captures, allocates: a pass over one block, and one over two
    with watched(bench, places := []):
        generate(block)
    found = {"batch": batch, "waits_a_pass": len(places) / block, "where": sorted(set(places))[:8]}
    return found | timed(bench, lambda: generate(new_tokens(bench)), batch)


def by_tokens(bench: Bench, causal: Any, config: dict[str, Any]) -> dict[str, Any]:
    ids = prompts(bench, config, 1)
    autoregressive(causal, ids, 8)
    return timed(bench, lambda: autoregressive(causal, ids, new_tokens(bench)), 1)


def timed(bench: Bench, way: Any, batch: int) -> dict[str, Any]:
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, new = bench.seconds(way), new_tokens(bench)
    found = {"seconds": seconds, "tokens_a_second": batch * new / seconds, "milliseconds_a_pass": 1e3 * seconds / new}
    if bench.cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found
