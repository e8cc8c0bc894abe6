"""Stages c and d: the experts of a layer against a loop over them, and the head on rows against full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_stages.bench import Bench, relative_error
from benchmarks.hosting import expert_product, loop_over_experts
from megatron_tide.models import grouped, target_logprobs
from megatron_tide.models.experts import Experts

EXPERTS = {"hidden": 2048, "width": 512, "experts": 256}
TINY_EXPERTS = {"hidden": 64, "width": 32, "experts": 8}
CHOSEN = 8


def experts(bench: Bench) -> None:
    """Values, time, and time over the roofline's: the longer of FLOPs at the peak and bytes at the bandwidth."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = random_experts(bench, dtype)
        several_routings(bench, layer, str(dtype).removeprefix("torch."))
        if bench.cuda and grouped._has_grouped_mm(bench.device, dtype):  # what a card without torch's kernel runs
            with patch.object(grouped, "_has_grouped_mm", return_value=False):
                several_routings(bench, layer, f"{dtype} by our Triton kernel".removeprefix("torch."))


def several_routings(bench: Bench, layer: Experts, how: str) -> None:
    for count in (16,) if bench.tiny else (2048, 16384):
        for spread, share in (("all experts", 1.0), ("three quarters of them empty", 0.25)):
            name = f"{how}, {count} tokens, {spread}"
            with bench.part(name):
                bench.note(**{name: one_routing(bench, layer, count, share)})


def random_experts(bench: Bench, dtype: torch.dtype) -> Experts:
    sizes = TINY_EXPERTS if bench.tiny else EXPERTS
    with torch.device(bench.device):
        layer = Experts(*sizes.values())
    for parameter in layer.requires_grad_(False).parameters():
        parameter.uniform_(-0.035, 0.035)
    return layer.to(dtype)


@torch.no_grad()
def one_routing(bench: Bench, layer: Experts, tokens: int, share: float) -> dict[str, float]:
    gate = layer.gate_proj
    count, chosen = len(gate), min(CHOSEN, int(len(gate) * share))
    scores = torch.rand(tokens, count, device=bench.device)
    scores[:, int(count * share) :] = -1.0
    index = scores.topk(chosen, 1).indices
    weight = torch.rand(tokens, chosen, device=bench.device)
    hidden = torch.randn(tokens, gate.shape[2], device=bench.device).to(gate.dtype)
    loop = loop_over_experts(expert_product(layer))
    error = relative_error(layer(hidden, index, weight), loop(hidden, index, weight))
    ours, theirs = bench.milliseconds(
        [lambda: layer(hidden, index, weight), lambda: loop(hidden, index, weight)], rounds=5, warmup=1
    )
    flops = 6.0 * tokens * chosen * gate[0].numel()
    read = 3.0 * gate[0].nbytes * count * share
    found = {"error": error, "milliseconds": ours, "loop_milliseconds": theirs, **bench.shares(flops, ours)}
    peak = bench.limits.get("bf16_tflops" if gate.dtype == torch.bfloat16 else "fp32_tflops")
    if peak and bench.limits.get("memory_gbs"):
        least = max(flops / peak / 1e9, read / bench.limits["memory_gbs"] / 1e6)
        found["over_roofline"] = ours / least
    return found


def head(bench: Bench) -> None:
    """Gold log-probs of M rows with gradients: values, time, memory, against cross-entropy of full logits."""
    vocab, hidden = (512, 32) if bench.tiny else (151936, 1024)
    weight = (0.02 * torch.randn(vocab, hidden, device=bench.device)).bfloat16().requires_grad_()
    for count in (24,) if bench.tiny else (512, 1024, 2048, 4096):
        rows = torch.randn(count, hidden, device=bench.device).bfloat16().requires_grad_()
        targets = torch.randint(vocab, (count,), device=bench.device)
        with bench.part(f"{count} rows"):
            bench.note(**{f"{count} rows": one_head(bench, rows, weight, targets)})


def full_logits(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (rows @ weight.t()).float()
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def one_head(bench: Bench, rows: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Any]:
    def step(way: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        logp = way(rows, weight, targets)
        return (logp.detach(), *torch.autograd.grad(logp.sum(), (rows, weight)))

    names = ("log_prob", "hidden_gradient", "weight_gradient")
    errors = [relative_error(a, b) for a, b in zip(step(target_logprobs), step(full_logits))]
    ours, theirs = bench.milliseconds([lambda: step(target_logprobs), lambda: step(full_logits)], rounds=5, warmup=1)
    return {
        "errors": dict(zip(names, errors)),
        "milliseconds": ours,
        "full_logits_milliseconds": theirs,
        "peak_bytes": bench.peak_bytes(lambda: step(target_logprobs)),
        "full_logits_peak_bytes": bench.peak_bytes(lambda: step(full_logits)),
        **bench.shares(6.0 * len(rows) * weight.numel(), ours),
    }
