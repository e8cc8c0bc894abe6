"""Generate text: a chat, or answers to prompts from the command line, a file or prepared data.

MODEL is a release, a folder or hub name of any model that decodes in blocks, or a training checkpoint (for a run
folder, its newest step); or any causal language model of transformers, which writes token by token. A chat shows the
current block while its masks resolve. Answers are printed, and appended to --json, as they come; a command that was
stopped, run again with the same --json, answers the rest.

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
from megatron_tide.cli import flag, say
from megatron_tide.commands import PRECISIONS, refuse_unused
from megatron_tide.machine import DEVICE_HELP


@dataclass(frozen=True, kw_only=True)
class RuleArgs:
    """Decoding."""

    min_new_tokens: int = flag(
        0, "Minimum number of tokens per answer: end of text is not chosen before", low=0, high=1 << 24
    )
    eos_in_order: bool = flag(
        False, "Decide end of text only at the first open position of a block, so that no answer ends too early"
    )
    tokens_per_step: int | None = flag(None, "Number of tokens decided per forward pass", shown="1", low=1)
    threshold: float | None = flag(
        None, "Probability above which tokens are decided immediately, e.g. 0.9: fewer passes", low=0, high=1
    )
    least_confident_first: bool = flag(False, "Decide the least probable tokens first")
    block_layout: str | None = flag(
        None, f"Where blocks begin. {BLOCK_LAYOUTS}", choices=BLOCK_LAYOUTS, shown="as the model states, or sequence"
    )
    temperature: float = flag(0.0, "Sampling temperature; 0 takes the most probable token", low=0, high=1000)


@dataclass(frozen=True, kw_only=True)
class DecodingArgs(RuleArgs):
    """Decoding."""

    max_new_tokens: int = flag(256, "Maximum number of tokens per answer", low=0, high=1 << 24)
    steps: int | None = flag(None, "Number of forward passes for --max-new-tokens, instead of --tokens-per-step", low=1)
    seed: int = flag(0, "Random seed for sampling with --temperature above 0", low=0)


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = flag(
        ...,
        "Model: release, hub-format folder, hub name, run folder, step folder or GGUF file",
        kind="positional",
        reads="model or GGUF",
    )
    chat: bool = flag(False, "Chat in the terminal")
    prompt: tuple[str, ...] = flag((), "User message; repeat the flag for several", metavar="TEXT", kind="repeated")
    file: Path | None = flag(
        None,
        'JSONL file of prompts, one {"prompt": TEXT} or {"messages": [...]} per line',
        metavar="FILE",
        reads="file",
    )
    data: Path | None = flag(
        None, "Folder of prepared data to take prompts from, evenly spaced", metavar="DIR", reads="folder"
    )
    system: str | None = flag(None, "System message before each --prompt, or of the chat", metavar="TEXT")
    infill: str | None = flag(
        None,
        "Answer to --prompt with gaps to fill in; <mask:N> is a gap of N tokens, \\n a line end, \\\\n a \\n",
        metavar="ANSWER",
    )
    limit: int = flag(0, "Maximum number of prompts from --file or --data", shown="all", low=0)
    batch_size: int = flag(8, "Number of prompts per batch", low=1, high=1 << 20)
    dtype: str = flag("float32", "Precision of the weights; a GGUF file has its own", choices=PRECISIONS)
    device: str = flag("auto", DEVICE_HELP, metavar="DEVICE")
    json: Path | None = flag(
        None,
        "Also write the answers to this file, as JSONL; those that it has already are kept",
        metavar="FILE",
        writes="file",
    )
    show_reference: bool = flag(False, "Also print the recorded answers of --file or --data")
    decoding: DecodingArgs = field(default_factory=DecodingArgs)


def run(args: Args) -> None:
    _check(args)
    from megatron_tide.generate import chat, open_writer
    from megatron_tide.models import DTYPES

    writer, model, tokenizer = open_writer(args.model, DTYPES[args.dtype], args.device)
    decoding = dataclasses.asdict(args.decoding) | ({"max_new_tokens": 0} if args.infill is not None else {})
    decoding["block_layout"] = args.decoding.block_layout or getattr(model.config, "block_layout", None) or "sequence"
    if args.chat:
        tokens, seconds = chat(writer.stream, model, tokenizer, system=args.system, **decoding)
    else:
        started = time.perf_counter()
        tokens = _answer(args, writer, model, tokenizer, decoding)
        seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s")


def _answer(args: Args, writer: Any, model: Any, tokenizer: Any, decoding: dict[str, Any]) -> int:
    """Answer the prompts, printing and writing each batch as it comes; -> tokens written now."""
    from tqdm import tqdm

    from megatron_tide.generate import AnswerFile, print_answer, tell_changes
    from megatron_tide.generate.identity import code, identity

    prompts, first_seed = _prompts(args, tokenizer), decoding.pop("seed")
    tell_changes(prompts)
    seeds = [first_seed + place if args.decoding.temperature else 0 for place in range(len(prompts))]
    file, places, tokens = None, list(range(len(prompts))), 0
    if args.json:
        decides = [identity(model, tokenizer.path, tokenizer), code(), args.dtype, decoding]
        file = AnswerFile(args.json, tokenizer, prompts, seeds, decides)
        places = file.missing
        if len(places) < len(prompts):
            say(f"{args.json}: {len(prompts) - len(places)} of {len(prompts)} answers are there from before")
    settings = {**decoding, "batch_size": args.batch_size, "seed": [seeds[place] for place in places]}
    hidden = len(places) <= args.batch_size
    with tqdm(total=len(prompts), initial=len(prompts) - len(places), desc="answers", disable=hidden) as bar:
        for batch in writer.answers(model, tokenizer, [prompts[place].ids for place in places], **settings):
            found = {places[number]: answer for number, answer in batch.items()}
            if file:
                file.add(found)
            with tqdm.external_write_mode():
                for place, answer in sorted(found.items()):
                    title = f"prompt {place + 1} of {len(prompts)}"
                    print_answer(tokenizer, prompts[place], answer, title, args.show_reference)
                    tokens += len(answer.ids) + prompts[place].holes
            bar.update(len(found))
    if file:
        file.close()
    return tokens


def _check(args: Args) -> None:
    sources = {"--chat": args.chat, "--prompt": args.prompt, "--file": args.file, "--data": args.data}
    if sum(map(bool, sources.values())) != 1:
        raise ValueError(f"use exactly one of {', '.join(sources)}")
    if args.decoding.steps is not None and args.decoding.tokens_per_step is not None:
        raise ValueError("use --steps or --tokens-per-step, not both")
    if args.infill is not None and not args.prompt:
        raise ValueError("--infill fills in an answer to --prompt; add --prompt TEXT")
    if args.chat and args.json:
        raise ValueError("--json is for answers to prompts, not for --chat; leave one of them out")
    if args.file or args.data:
        refuse_unused(args, "--prompt and --chat: messages of a file name their own roles", ["system"])
    else:
        refuse_unused(args, "--file and --data", ["limit", "show_reference"])
    if args.infill is not None:  # nothing is written behind the text, which the holes are in
        behind = ("max_new_tokens", "min_new_tokens", "steps")
        refuse_unused(args.decoding, "answers that are written, not to --infill", behind)


def _prompts(args: Args, tokenizer: Any) -> list[Any]:
    from megatron_tide.data import PreparedData
    from megatron_tide.generate import from_prepared, from_text, read_prompts, with_holes

    if args.file:
        return read_prompts(args.file, tokenizer, args.limit)
    if args.data:
        return from_prepared(PreparedData.open(args.data), tokenizer, args.limit)
    prompts = [from_text(tokenizer, text, args.system) for text in args.prompt]
    if args.infill is not None:
        answer = "\\n".join(part.replace("\\n", "\n") for part in args.infill.split("\\\\n"))
        prompts = [with_holes(tokenizer, prompt, answer) for prompt in prompts]
    return prompts
