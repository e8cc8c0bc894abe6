"""A training step with the head on masked rows only, against the plain way that makes all logits.

One step = student forward over [xt ; x0], denoising loss, backward into every parameter; the same weights, batch and
noise both ways, and the losses and gradients must agree before anything is timed.

  plain   the whole [xt ; x0] of 2S positions, logits [B, 2S, V], cross-entropy of the masked positions, autograd
  ours    the packed staircase, hidden rows of masked positions, gold log-probabilities in chunks of rows

The vocabulary is Qwen3's; a quarter of each sample is prompt, and each response token is masked with probability
t = 0.5, the mean of what training draws. Seconds are medians of alternating steps. Memory is what a step adds, at its
peak, to the resident memory of a process of its own that already holds weights and gradients and has made a step on a
few tokens, so that code and thread pools are in place; the C allocator is told to give freed tensors back at once, so
that what is counted is memory in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import paired_seconds, peak_extra, report
from megatron_tide import cli
from megatron_tide.data.batch import Batch, Tokens
from megatron_tide.diffusion import ChunkMasking, DistillBatch, build_inputs, noise, staircase_mask
from megatron_tide.files import read_json
from megatron_tide.models import fresh_model, masked_hidden_states, target_logprobs

CONFIG = Path(__file__).parents[1] / "megatron_tide/models/configs/qwen3_0.6b.json"
SMALLER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SAMPLES, LENGTH, BLOCK = 4, 256, 32
PROMPT, T = 0.25, 0.5  # share of a sample, rate of masking
SEED = 0

Way = Callable[["Step"], Tensor]


def make_batch(vocab: int, samples: int, length: int) -> tuple[Batch, DistillBatch, Tensor]:
    """One-sided samples of random tokens, their student view, and the mask bool [B, S] behind it."""
    generator = torch.Generator().manual_seed(SEED)
    prompt, whole = int(length * PROMPT), torch.full((samples,), length)
    tokens = Tokens(
        ids=torch.randint(vocab - 1, (samples, length), generator=generator),
        chunk=torch.where(torch.arange(length) < prompt, -1, -2).repeat(samples, 1).int(),
        length=whole,
        prompt=torch.full_like(whole, prompt),
        content_end=whole - 1,
    )
    batch = Batch(keys=torch.arange(samples), student=tokens, teacher=None, chunks=torch.zeros_like(whole))
    drawn = noise(batch, seed=SEED, epoch=0, masking=ChunkMasking(), t=torch.full((samples,), T, dtype=torch.float64))
    noised = build_inputs(batch, drawn, student_block=BLOCK, student_mask_id=vocab - 1, teacher=None)
    return batch, noised, drawn.student_masked


def ours(step: Step) -> Tensor:
    rows = masked_hidden_states(step.model, step.noised.student)
    logp = target_logprobs(rows, step.model.head_weight, step.noised.student_targets)
    return -(logp / step.noised.inverse_weight[step.noised.student_level]).sum() / step.noised.maskable


def plain(step: Step) -> Tensor:
    clean, masked = step.batch.student.ids, step.masked
    samples, length = clean.shape
    both = torch.cat((clean.masked_fill(masked, step.model.config.vocab_size - 1), clean), 1)
    positions = torch.arange(length).repeat(2).expand(samples, -1)
    mask = staircase_mask(length, BLOCK).expand(samples, 1, -1, -1)
    logits = step.model(both, mask, positions).logits.float()[:, :length]
    losses = torch.nn.functional.cross_entropy(logits[masked], clean[masked], reduction="none")
    return (losses / step.noised.inverse_weight[step.noised.student_level]).sum() / step.noised.maskable


WAYS: dict[str, Way] = {"plain": plain, "ours": ours}


class Step:
    """A model and a batch, and a step on them in either way."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model: Any = fresh_model({**read_json(CONFIG), **SMALLER}, SEED).to(dtype).train()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.take(SAMPLES, LENGTH)

    def take(self, samples: int, length: int) -> None:
        """Take a batch of this size for the steps to come."""
        self.batch, self.noised, self.masked = make_batch(self.model.config.vocab_size, samples, length)

    def run(self, way: str) -> float:
        """One step; gradients are added to what is there, as they are under accumulation. -> the loss."""
        loss = WAYS[way](self)
        loss.backward()
        return loss.item()

    def gradients(self, way: str) -> tuple[float, Tensor]:
        """The loss and all gradients of one step, as one vector."""
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        loss = self.run(way)
        return loss, torch.cat([parameter.grad.flatten().float() for parameter in self.model.parameters()])


def peak_extra_bytes(way: str, dtype: torch.dtype) -> int:
    """In this process: the peak of resident memory within one step, less what was resident before it."""
    step = Step(dtype)
    step.take(1, BLOCK)
    step.run(way)
    step.take(SAMPLES, LENGTH)
    return peak_extra(lambda: step.run(way))


def measure_apart(way: str, dtype: str) -> int:
    """:func:`peak_extra_bytes` in a fresh process, whose allocator keeps nothing of 64 KiB or more for later."""
    command = [sys.executable, "-m", "benchmarks.step", "--dtype", dtype, "--memory-of", way]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"measuring the memory of {way} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def figures(dtype: str, rounds: int) -> dict[str, Any]:
    """Everything that the report holds."""
    step = Step(getattr(torch, dtype))
    (plain_loss, plain_gradient), (our_loss, our_gradient) = step.gradients("plain"), step.gradients("ours")
    difference = float((plain_gradient - our_gradient).norm() / plain_gradient.norm())
    limit = 1e-4 if dtype == "float32" else 0.05
    if difference > limit or abs(our_loss / plain_loss - 1) > limit:
        raise AssertionError(f"the two ways differ: losses {plain_loss} and {our_loss}, gradients by {difference}")
    del plain_gradient, our_gradient
    plain_seconds, our_seconds = paired_seconds([lambda: step.run("plain"), lambda: step.run("ours")], rounds)
    plain_bytes, our_bytes = measure_apart("plain", dtype), measure_apart("ours", dtype)
    return {
        "speedup": plain_seconds / our_seconds,
        "extra_memory_ratio": our_bytes / plain_bytes,
        "plain_seconds": plain_seconds,
        "our_seconds": our_seconds,
        "plain_extra_bytes": plain_bytes,
        "our_extra_bytes": our_bytes,
        "loss_difference": abs(plain_loss - our_loss),
        "gradient_difference": difference,
        "rounds": rounds,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "vocabulary": step.model.config.vocab_size,
        "shape": {"samples": SAMPLES, "length": LENGTH, **SMALLER},
        "masking": f"t = {T} over the last {1 - PROMPT:.0%} of every sample",
        "masked_rows": len(step.noised.student_targets),
        "our_positions": step.noised.student.input_ids.numel(),
        "plain_positions": 2 * SAMPLES * LENGTH,
    }


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and gradients")
    parser.add_argument("--memory-of", choices=sorted(WAYS), help="only print one way's extra bytes, from this process")
    options = parser.parse_args(argv)
    if options.memory_of:
        print(json.dumps(peak_extra_bytes(options.memory_of, getattr(torch, options.dtype))))
        return
    report("step", figures(options.dtype, options.rounds), options.json)


if __name__ == "__main__":
    cli.run(main)
