"""Block decoding at the 0.6B shape against the plain way and against an autoregressive model of the same size.

The four of a case in one run, with the same random weights, batch and number of new tokens:

  ours       the sampler of every release: exact cache, head on undecided positions, a block committed by the next one's
             first pass
  plain      the block diffusion sampler as it is usually written: before each block the whole prefix is encoded again,
             every pass works on a copy of that cache, and logits are made for all positions of every call
  ar         transformers' own greedy ``generate`` of a Qwen3ForCausalLM with the same weights
  threshold  ours, with the threshold rule at 2.5 tokens a pass: 2 and 3 in turn, because random weights are sure of
             nothing; the rule is computed, and each row decides as many

No text ends early. ``speedup_*`` are ratios of seconds, for each case and, at the top, for the case they are worst in;
``identical_tokens`` says whether ours and plain wrote the same tokens. In bf16 that is not a matter of course: the two
multiply matrices of other shapes. Memory is what a call adds at its peak to the weights. ``our_flops_a_second`` beside
``matmul_flops_a_second`` says how much of the machine is left to win: a pass computes 32 positions, and ar's computes
one. All of it takes most of an hour on two cores; figures are written after each case, and ``--go-on`` takes up a run
that was cut off.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import peak_extra, report
from megatron_tide import cli
from megatron_tide.files import read_json
from megatron_tide.machine import machine, matmul_rate, versions
from megatron_tide.models import fresh_model
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.sampling_a2d import DecodingRule

CONFIG = Path(__file__).parents[1] / "megatron_tide/models/configs/qwen3_0.6b.json"
BLOCK, SEED = 32, 0
THRESHOLD = (2, 3)  # tokens a pass, in turn: what a threshold rule decides on real text, about 2.5


@dataclass(frozen=True)
class Written:
    """What one way wrote, [B, new], and what it took."""

    tokens: Tensor
    passes: int
    seconds: float
    bytes: int

    def figures(self) -> dict[str, float]:
        new = self.tokens.shape[1]
        return {
            "seconds": self.seconds,
            "tokens_per_s": self.tokens.numel() / self.seconds,
            "passes": self.passes,
            "tokens_a_pass": new / self.passes,
            "ms_a_pass": 1000 * self.seconds / self.passes,
            "extra_bytes": self.bytes,
        }


def timed(way: Callable[[], tuple[Tensor, int]]) -> Written:
    taken: list[Any] = []

    def run() -> None:
        start = time.perf_counter()
        taken.extend(way())
        taken.append(time.perf_counter() - start)

    extra = peak_extra(run)
    tokens, passes, seconds = taken
    return Written(tokens, passes, seconds, extra)


def ours(model: Any, prompts: Tensor, new: int, per_pass: Sequence[int] = (1,)) -> tuple[Tensor, int]:
    """``per_pass``: tokens that each pass decides in every row, in turn."""
    mask = model.config.vocab_size - 1
    rules = [
        DecodingRule(
            block_size=BLOCK,
            mask_token_id=mask,
            eos_token_ids=(),
            pad_token_id=mask,
            max_new_tokens=new,
            tokens_per_step=tokens,
            threshold=1.0 if len(per_pass) > 1 else None,
        )
        for tokens in per_pass
    ]
    decoder = BlockDecoder(model, list(prompts), rules[0], [SEED] * len(prompts))
    for _ in decoder.run():
        decoder.rule = rules[decoder.passes % len(rules)]
    return torch.stack(decoder.completions()), decoder.passes


@torch.no_grad()
def plain(model: Any, prompts: Tensor, new: int) -> tuple[Tensor, int]:
    """Prompts that end with a block; one token a pass in every row."""
    mask, text, passes = model.config.vocab_size - 1, prompts, 0
    for _ in range(0, new, BLOCK):
        length = text.shape[1]
        of_block = torch.arange(length) // BLOCK
        prefix, places = DynamicCache(), torch.arange(length, length + BLOCK).unsqueeze(0)
        model(text, (of_block.unsqueeze(1) >= of_block)[None, None], torch.arange(length).unsqueeze(0), prefix)
        block = torch.full((len(prompts), BLOCK), mask)
        for _ in range(BLOCK):
            logits = model(block, None, places, copy.deepcopy(prefix)).logits
            logits[..., mask] = -torch.inf
            confidence, tokens = logits.float().softmax(-1).max(-1)
            confidence[block != mask] = -1.0
            place = confidence.argmax(-1, keepdim=True)
            block = block.scatter(1, place, tokens.gather(1, place))
            passes += 1
        text = torch.cat((text, block), 1)
    return text[:, prompts.shape[1] :], passes


def autoregressive(model: Any, prompts: Tensor, new: int) -> tuple[Tensor, int]:
    asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), **asked)
    return written[:, prompts.shape[1] :], new


def autoregressive_model(model: Any, config: dict[str, Any]) -> Any:
    """transformers' Qwen3 with the very weights of ``model`` (shared, not copied), and none of our code."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        causal = Qwen3ForCausalLM(Qwen3Config(**values))
    causal.load_state_dict(model.state_dict(), assign=True, strict=False)
    causal.tie_weights()
    causal.model.rotary_emb = type(causal.model.rotary_emb)(causal.config)
    return causal.eval()


def our_flops(model: Any, batch: int, prompt: int, new: int) -> float:
    """Multiplications and additions of matrices in one answer of ours at one token a pass, attention left out."""
    config, blocks = model.config, new // BLOCK
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    rows = new * BLOCK + prompt + (blocks - 1) * BLOCK  # every pass, and each finished block once more
    undecided = blocks * BLOCK * (BLOCK + 1) / 2
    return 2.0 * batch * (rows * layers + undecided * head)


def case(model: Any, causal: Any, batch: int, prompt: int, new: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(model.config.vocab_size - 1, (batch, prompt), generator=generator)
    written = {
        "ours": timed(lambda: ours(model, prompts, new)),
        "threshold": timed(lambda: ours(model, prompts, new, THRESHOLD)),
        "ar": timed(lambda: autoregressive(causal, prompts, new)),
        "plain": timed(lambda: plain(model, prompts, new)),
    }
    seconds = {name: way.seconds for name, way in written.items()}
    same = written["ours"].tokens == written["plain"].tokens
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "speedup_plain": seconds["plain"] / seconds["ours"],
        "speedup_ar_one_token": seconds["ar"] / seconds["ours"],
        "speedup_ar_threshold": seconds["ar"] / seconds["threshold"],
        "identical_tokens": bool(same.all()),
        "identical_share": float(same.float().mean()),
        "our_flops_a_second": our_flops(model, batch, prompt, new) / seconds["ours"],
        **{name: way.figures() for name, way in written.items()},
    }


def measured_before(path: str, prompt: int, dtype: str) -> list[dict[str, Any]]:
    """The cases that a report holds already; ValueError where they would not stand beside those of this run."""
    if not Path(path).exists():
        return []
    record = read_json(Path(path))
    here = {"machine": machine(), "versions": versions(), "dtype": dtype, "threads": torch.get_num_threads()}
    if differs := [name for name, value in here.items() if record.get(name) != value]:
        raise ValueError(
            f"{path}: its {differs[0]} is not that of this run; leave --go-on out, and all is measured anew"
        )
    return [entry for entry in record["cases"] if entry["prompt"] == prompt]


def figures(
    batches: list[int], lengths: list[int], prompt: int, dtype: str, before: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Everything that the report holds, after each case; those of ``before`` are not measured again."""
    for name, length in (("--prompt", prompt), *(("--new", new) for new in lengths)):
        if length % BLOCK:
            raise ValueError(f"{name} {length}: the plain way takes whole blocks of {BLOCK} only")
    config = read_json(CONFIG)
    model = fresh_model(config, SEED).to(getattr(torch, dtype)).eval()
    causal = autoregressive_model(model, config)
    warm = torch.zeros(1, BLOCK, dtype=torch.int64)
    for way, subject in ((ours, model), (plain, model), (autoregressive, causal)):
        way(subject, warm, BLOCK)
    names = ("speedup_plain", "speedup_ar_one_token", "speedup_ar_threshold")
    frame = {
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "matmul_flops_a_second": matmul_rate(model.dtype),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    found = {(entry["batch"], entry["new"]): entry for entry in before}
    for batch, new in itertools.product(batches, lengths):
        if (batch, new) in found:
            print(f"batch {batch}, {new} new tokens: measured before", flush=True)
            continue
        print(f"batch {batch}, {new} new tokens ...", flush=True)
        found[batch, new] = case(model, causal, batch, prompt, new)
        cases = [found[size] for size in sorted(found)]
        worst = {name: min(entry[name] for entry in cases) for name in names}
        identical = all(entry["identical_tokens"] for entry in cases)
        yield {**worst, "identical_tokens": identical, **frame, "cases": cases}


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: %(default)s)")
    parser.add_argument("--new", type=int, nargs="+", default=[64, 256], help="new tokens (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of weights")
    parser.add_argument("--go-on", action="store_true", help="do not measure again what --json FILE holds already")
    options = parser.parse_args(argv)
    if options.go_on and not options.json:
        raise ValueError("--go-on: takes up the cases of a file; give --json FILE as well")
    before = measured_before(options.json, options.prompt, options.dtype) if options.go_on else []
    for found in figures(options.batch, options.new, options.prompt, options.dtype, before):
        report("generate", found, options.json)


if __name__ == "__main__":
    cli.run(main)
