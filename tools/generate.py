"""Let a model write: a chat, prompts on the command line, a JSONL file, or the prompts of prepared data.

    python tools/generate.py runs/quickstart/hf --chat
    python tools/generate.py runs/quickstart/hf --prompt "Return the sum of a list."
    python tools/generate.py runs/quickstart/hf --prompt "Add two." --infill "def add(a, b):\\n    return <mask:4>"
    python tools/generate.py runs/quickstart/tide-cross --data runs/quickstart/test-data --limit 3
    python tools/generate.py runs/quickstart/hf --file prompts.jsonl --threshold 0.9 --json answers.jsonl

MODEL is a release, any a2d-qwen3 or llada2_moe folder or hub name, or a checkpoint of the trainer (a run folder: its
newest step). In a chat the block under way is shown while its masks resolve.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_tide import cli
from megatron_tide.machine import DEVICE_HELP, device_of


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release, hub-format folder, hub name, run folder or step folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--chat", action="store_true", help="talk in the terminal")
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="one user message; may be given several times"
    )
    source.add_argument("--file", help='JSONL: {"prompt": TEXT} or {"messages": [...]} a line')
    source.add_argument("--data", help="prepared folder: its prompts, spread evenly over it")
    parser.add_argument("--system", help="system message before each --prompt, or of the chat")
    parser.add_argument(
        "--infill", metavar="ANSWER", help="fill the holes of this answer to --prompt in: <mask:N> is N tokens"
    )
    parser.add_argument("--limit", type=int, default=0, help="at most this many prompts of --file or --data [all]")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer [256]")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--tokens-per-step", type=int, help="tokens decided in each pass [1]")
    pace.add_argument("--steps", type=int, help="passes for the whole of --max-new-tokens, instead")
    parser.add_argument(
        "--threshold", type=float, help="also decide every token whose probability exceeds this, e.g. 0.9: fewer passes"
    )
    parser.add_argument(
        "--least-confident-first", action="store_true", help="decide the tokens it is least sure of first"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token [0]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws when --temperature is above 0 [0]")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together [8]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="precision [float32]")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--json", metavar="FILE", help="also write the answers as JSONL")
    parser.add_argument("--show-reference", action="store_true", help="print the recorded answer as well")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = arguments_of(argv)
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.generate import chat, complete
    from megatron_tide.release import DTYPES, open_model

    opened = open_model(arguments.model, DTYPES[arguments.dtype], device_of(arguments.device))
    tokenizer = load_tokenizer(opened.folder)
    knobs = {
        "max_new_tokens": 0 if arguments.infill else arguments.max_new_tokens,
        "tokens_per_step": arguments.tokens_per_step,
        "steps": arguments.steps,
        "threshold": arguments.threshold,
        "least_confident_first": arguments.least_confident_first,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    if arguments.chat:
        tokens, seconds = chat(opened.model, tokenizer, system=arguments.system, **knobs)
    else:
        prompts = prompts_of(arguments, tokenizer)
        started = time.perf_counter()
        answers = complete(
            opened.model, tokenizer, [prompt.ids for prompt in prompts], batch_size=arguments.batch_size, **knobs
        )
        seconds = time.perf_counter() - started
        show(arguments, tokenizer, prompts, answers)
        tokens = sum(len(a.ids) + int((p.ids == tokenizer.mask_id).sum()) for p, a in zip(prompts, answers))
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s")
    return 0


def show(arguments: argparse.Namespace, tokenizer: Any, prompts: list[Any], answers: list[Any]) -> None:
    """Print each answer below its prompt; write them to --json where that is asked for."""
    texts = [prompt.answer(tokenizer, answer) for prompt, answer in zip(prompts, answers)]
    for number, (prompt, answer, text) in enumerate(zip(prompts, answers, texts), 1):
        print(f"--- prompt {number} of {len(prompts)}\n{prompt.shown.strip()}")
        if arguments.show_reference and prompt.reference is not None:
            print(f"--- on record\n{prompt.reference.rstrip()}")
        cut = not answer.finished and not prompt.begun
        print(f"--- answer{' (cut at --max-new-tokens)' if cut else ''}\n{text.rstrip()}\n")
    if arguments.json:
        rows: list[dict[str, Any]] = [
            {"prompt": p.shown, "answer": t, "tokens": len(a.ids), "finished": a.finished, "reference": p.reference}
            for p, a, t in zip(prompts, answers, texts)
        ]
        Path(arguments.json).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def prompts_of(arguments: argparse.Namespace, tokenizer: Any) -> list[Any]:
    from megatron_tide.data import PreparedData
    from megatron_tide.generate import from_prepared, from_text, read_prompts, with_holes

    if arguments.infill and not arguments.prompt:
        raise ValueError("--infill fills an answer to --prompt in; give one")
    if arguments.file:
        return read_prompts(arguments.file, tokenizer, arguments.limit)
    if arguments.data:
        return from_prepared(PreparedData.open(arguments.data), tokenizer, arguments.limit)
    prompts = [from_text(tokenizer, text, arguments.system) for text in arguments.prompt]
    if arguments.infill:
        answer = arguments.infill.replace("\\n", "\n")
        prompts = [with_holes(tokenizer, prompt, answer) for prompt in prompts]
    return prompts


if __name__ == "__main__":
    cli.run(main)
