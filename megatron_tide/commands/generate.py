"""Generate text: a chat, or answers to prompts from the command line, a file or prepared data.

MODEL is a release, an a2d-qwen3 or llada2_moe folder or hub name, or a training checkpoint (for a run folder, its
newest step). A chat shows the current block while its masks resolve.

Examples:
  python -m megatron_tide generate runs/quickstart/hf --chat
  python -m megatron_tide generate runs/quickstart/hf --prompt "Return the sum of a list." --threshold 0.9
  python -m megatron_tide generate runs/quickstart/hf --prompt "Add two." \\
      --infill "def add(a, b):\\n    return <mask:4>"
  python -m megatron_tide generate runs/quickstart/tide-cross --data runs/quickstart/test-data --limit 3
  python -m megatron_tide generate runs/quickstart/hf --file prompts.jsonl --json answers.jsonl
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tide.choices import BLOCK_LAYOUTS
from megatron_tide.cli import flag
from megatron_tide.machine import DEVICE_HELP, device_of


@dataclass(frozen=True, kw_only=True)
class DecodingArgs:
    """Decoding."""

    max_new_tokens: int = flag(256, "Maximum number of tokens per answer")
    min_new_tokens: int = flag(0, "Minimum number of tokens per answer: end of text is not chosen before", low=0)
    eos_in_order: bool = flag(
        False, "Decide end of text only at the first open position of a block, so that no answer ends too early"
    )
    tokens_per_step: int | None = flag(None, "Number of tokens decided per forward pass", shown="1")
    steps: int | None = flag(None, "Number of forward passes for --max-new-tokens, instead of --tokens-per-step")
    threshold: float | None = flag(
        None, "Probability above which tokens are decided immediately, e.g. 0.9: fewer passes"
    )
    least_confident_first: bool = flag(False, "Decide the least probable tokens first")
    block_layout: str = flag("sequence", f"Where blocks begin. {BLOCK_LAYOUTS}", choices=BLOCK_LAYOUTS)
    temperature: float = flag(0.0, "Sampling temperature; 0 takes the most probable token")
    seed: int = flag(0, "Random seed for sampling with --temperature above 0")


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = flag(..., "Model: release, hub-format folder, hub name, run folder or step folder", kind="positional")
    chat: bool = flag(False, "Chat in the terminal")
    prompt: tuple[str, ...] = flag((), "User message; repeat the flag for several", metavar="TEXT", kind="repeated")
    file: Path | None = flag(
        None, 'JSONL file of prompts, one {"prompt": TEXT} or {"messages": [...]} per line', metavar="FILE"
    )
    data: Path | None = flag(None, "Folder of prepared data to take prompts from, evenly spaced", metavar="DIR")
    system: str | None = flag(None, "System message before each --prompt, or of the chat", metavar="TEXT")
    infill: str | None = flag(
        None, "Answer to --prompt with gaps to fill in; <mask:N> is a gap of N tokens", metavar="ANSWER"
    )
    limit: int = flag(0, "Maximum number of prompts from --file or --data", shown="all", low=0)
    batch_size: int = flag(8, "Number of prompts per batch")
    dtype: str = flag("float32", "Precision of the weights", choices=("bfloat16", "float32"))
    device: str = flag("auto", DEVICE_HELP, metavar="DEVICE")
    json: Path | None = flag(None, "Also write the answers to this file, as JSONL", metavar="FILE")
    show_reference: bool = flag(False, "Also print the recorded answers of --file or --data")
    decoding: DecodingArgs = field(default_factory=DecodingArgs)


def run(args: Args) -> None:
    _check(args)
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.generate import chat, complete, print_answers, write_answers
    from megatron_tide.models import DTYPES
    from megatron_tide.training_checkpoint import open_model

    opened = open_model(args.model, DTYPES[args.dtype], device_of(args.device))
    tokenizer = load_tokenizer(opened.folder)
    decoding = dataclasses.asdict(args.decoding) | ({"max_new_tokens": 0} if args.infill else {})
    if args.chat:
        tokens, seconds = chat(opened.model, tokenizer, system=args.system, **decoding)
    else:
        prompts = _prompts(args, tokenizer)
        started = time.perf_counter()
        ids = [prompt.ids for prompt in prompts]
        answers = complete(opened.model, tokenizer, ids, batch_size=args.batch_size, **decoding)
        seconds = time.perf_counter() - started
        print_answers(tokenizer, prompts, answers, args.show_reference)
        if args.json:
            write_answers(args.json, tokenizer, prompts, answers)
        tokens = sum(len(a.ids) + int((p.ids == tokenizer.mask_id).sum()) for p, a in zip(prompts, answers))
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s")


def _check(args: Args) -> None:
    sources = {"--chat": args.chat, "--prompt": args.prompt, "--file": args.file, "--data": args.data}
    if sum(map(bool, sources.values())) != 1:
        raise ValueError(f"use exactly one of {', '.join(sources)}")
    if args.decoding.steps is not None and args.decoding.tokens_per_step is not None:
        raise ValueError("use --steps or --tokens-per-step, not both")
    if args.infill and not args.prompt:
        raise ValueError("--infill fills in an answer to --prompt; add --prompt TEXT")


def _prompts(args: Args, tokenizer: Any) -> list[Any]:
    from megatron_tide.data import PreparedData
    from megatron_tide.generate import from_prepared, from_text, read_prompts, with_holes

    if args.file:
        return read_prompts(args.file, tokenizer, args.limit)
    if args.data:
        return from_prepared(PreparedData.open(args.data), tokenizer, args.limit)
    prompts = [from_text(tokenizer, text, args.system) for text in args.prompt]
    if args.infill:
        answer = args.infill.replace("\\n", "\n")
        prompts = [with_holes(tokenizer, prompt, answer) for prompt in prompts]
    return prompts
