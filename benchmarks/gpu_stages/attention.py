"""Stage b: flex attention with block masks against a dense mask: values, gradients, time, number of compiled graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.gpu_stages.bench import Bench, relative_error
from megatron_tide.diffusion.attention import BlockDiffusionMask
from megatron_tide.models.backbone_a2d import attend, attention_mask_for

HEADS = {"student": (16, 8, 128), "teacher": (16, 4, 128)}  # query heads, key heads, size
CONTEXTS = ("full", "block_causal", "staircase")
SCALE = 128**-0.5
TILE = 128  # lengths are padded to full tiles, as in training
SAMPLES, BLOCK, LONGEST, STEP = (1, 4, 8), 32, 2048, 32
ONE_GRAPH = 15  # seconds that one may take to compile
WRONG = 2e-2  # relative error in bf16 that rounding does not explain


@dataclass(frozen=True)
class Case:
    context: str
    heads: str
    samples: int
    length: int


def run(bench: Bench) -> None:
    with bench.part("sweep"):
        sweep(bench)
    bench.note(compiled=compiled())
    with bench.part("times"):
        bench.note(milliseconds=times(bench))


def sweep(bench: Bench) -> None:
    """All cases that there is time for; written as they come, because the time may end in the middle of one."""
    cases, worst, wrong = list(_cases(bench.tiny)), {"value": 0.0, "gradient": 0.0}, []
    for number, case in enumerate(cases):
        if number % 18 == 0 or bench.left < ONE_GRAPH:
            bench.note(cases=number, of=len(cases), worst_error=worst, wrong=len(wrong), first_wrong=wrong[:5])
        if bench.left < ONE_GRAPH:
            return
        errors = compare(bench, case)
        worst = {name: max(worst[name], errors.get(name, 0.0)) for name in worst}
        if not all(error < WRONG for error in errors.values()):  # a NaN is wrong too
            wrong.append({**vars(case), **errors})
    bench.note(cases=len(cases), of=len(cases), worst_error=worst, wrong=len(wrong), first_wrong=wrong[:5])


def _cases(tiny: bool) -> Iterator[Case]:
    """Coarse lengths first, so that a sweep that is cut off has seen the whole range."""
    layouts = list(itertools.product(CONTEXTS, HEADS, (2,) if tiny else SAMPLES))
    every = [64, 96] if tiny else range(64, LONGEST + 1, STEP)
    for length in sorted(every, key=lambda n: (n % 512 != 0, n % 128 != 0, n)):
        for context, heads, samples in layouts:
            yield Case(context, heads, samples, length)


def mask_of(case: Case, device: torch.device) -> BlockDiffusionMask:
    """Sequences of different lengths below ``case.length``; for the staircase half is noised, half clean."""
    position = torch.arange(case.length).expand(case.samples, -1)
    ends = case.length - BLOCK * torch.arange(case.samples)[:, None].clamp(max=(case.length - BLOCK) // BLOCK)
    noised, block = torch.zeros_like(position, dtype=torch.bool), position // BLOCK
    if case.context == "full":
        block = torch.zeros_like(position)
    if case.context == "staircase":
        half = ends // 2 // BLOCK * BLOCK
        noised = position < half
        block = torch.where(noised, position, position - half) // BLOCK
    return BlockDiffusionMask(block.int(), noised, position < ends).to(device)


def padded(mask: BlockDiffusionMask, more: int) -> BlockDiffusionMask:
    """With so many positions of padding behind every sequence."""
    return BlockDiffusionMask(*(pad(tensor, (0, more)) for tensor in (mask.block, mask.noised, mask.valid)))


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    heads, kv_heads, size = HEADS[case.heads]
    generator = torch.Generator(device).manual_seed(case.length)
    shapes = [(case.samples, n, case.length, size) for n in (heads, kv_heads, kv_heads)]
    # On a CPU flex attention has no backward pass.
    grads = device.type == "cuda"
    return [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_(grads) for s in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    share = query.shape[1] // key.shape[1]
    return scaled_dot_product_attention(
        query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), attn_mask=mask
    )


def compare(bench: Bench, case: Case) -> dict[str, float]:
    """Relative errors of value and gradients in bf16 against a dense mask in fp32, from the same bf16 inputs."""
    mask, parts = mask_of(case, bench.device), inputs(case, bench.device, torch.bfloat16)
    exact = [part.detach().float().requires_grad_(bench.cuda) for part in parts]
    wanted = dense(*exact, mask.dense())
    more = -case.length % TILE
    block_mask = attention_mask_for(padded(mask, more).flex(), torch.bfloat16)
    whole = [pad(part, (0, 0, 0, more)) for part in parts]
    found = attend(*whole, block_mask, SCALE)[:, :, : case.length]
    errors = {"value": relative_error(found.detach(), wanted.detach())}
    if not bench.cuda:
        return errors
    weight = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, parts, weight.to(found.dtype))
    theirs = torch.autograd.grad(wanted, exact, weight)
    return {**errors, "gradient": max(relative_error(a, b) for a, b in zip(mine, theirs))}


def blocks(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return attend(query, key, value, mask, SCALE)


def compiled() -> dict[str, int]:
    """Graphs that torch compiled in this process, and frames that it gave up on."""
    from torch._dynamo.utils import counters

    stats = counters["stats"]
    broken = sum(counters["graph_break"].values()) if "graph_break" in counters else 0
    return {"graphs": int(stats.get("unique_graphs", 0)), "breaks": int(broken)}


def times(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward at lengths of training: flex (its mask made once), the making of the mask, dense."""
    found = []
    for context, length in itertools.product(CONTEXTS, (64,) if bench.tiny else (512, 1024, 2048)):
        case = Case(context, "student", 2 if bench.tiny else 4, length)
        mask, parts = mask_of(case, bench.device), inputs(case, bench.device, torch.bfloat16)
        flex, whole = mask.flex(), mask.dense()

        def step(way: Callable[..., Tensor], mask: Any, parts: list[Tensor] = parts) -> None:
            result = way(*parts, mask)
            if bench.cuda:
                result.sum().backward()

        ways = [lambda: step(blocks, flex), lambda: step(dense, whole), mask.flex]  # noqa: B023
        names = ("flex", "dense", "making_the_mask")
        found.append({**vars(case), **dict(zip(names, bench.milliseconds(ways, rounds=10)))})
    return found
