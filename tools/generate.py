"""Let a student write: from prompts on the command line, a JSONL file, or the prompts of prepared data.

    python tools/generate.py runs/quickstart/hf --prompt "Return the sum of a list."
    python tools/generate.py runs/quickstart/tide-cross --data runs/quickstart/test-data --limit 3
    python tools/generate.py runs/quickstart/hf --file prompts.jsonl --threshold 0.9 --json answers.jsonl

MODEL is a release, any a2d-qwen3 folder or hub name, or a checkpoint of the trainer (a run folder: its newest step).
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


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="release, hub-format folder, hub name, run folder or step folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="one user message; may be given several times"
    )
    source.add_argument("--file", help='JSONL: {"prompt": TEXT} or {"messages": [...]} a line')
    source.add_argument("--data", help="prepared folder: its prompts, spread evenly over it")
    parser.add_argument("--system", help="system message before each --prompt")
    parser.add_argument("--limit", type=int, default=0, help="at most this many prompts of --file or --data [all]")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--tokens-per-step", type=int, default=1, help="tokens decided in each pass [1]")
    parser.add_argument(
        "--threshold", type=float, help="also decide every token whose probability exceeds this, e.g. 0.9: fewer passes"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token [0]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws when --temperature is above 0 [0]")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together [8]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="precision [float32]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--json", metavar="FILE", help="also write the answers as JSONL")
    parser.add_argument("--show-reference", action="store_true", help="print the recorded answer as well")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = arguments_of(argv)
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.generate import complete
    from megatron_tide.release import DTYPES, open_model

    opened = open_model(arguments.model, DTYPES[arguments.dtype], arguments.device)
    tokenizer = load_tokenizer(opened.folder)
    prompts = prompts_of(arguments, tokenizer)
    started = time.perf_counter()
    answers = complete(
        opened.model,
        tokenizer,
        [prompt.ids for prompt in prompts],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        tokens_per_step=arguments.tokens_per_step,
        threshold=arguments.threshold,
        temperature=arguments.temperature,
    )
    seconds = time.perf_counter() - started
    for number, (prompt, answer) in enumerate(zip(prompts, answers), 1):
        print(f"--- prompt {number} of {len(prompts)}\n{prompt.shown.strip()}")
        if arguments.show_reference and prompt.reference is not None:
            print(f"--- on record\n{prompt.reference.rstrip()}")
        print(f"--- answer{'' if answer.finished else ' (cut at --max-new-tokens)'}\n{answer.text.rstrip()}\n")
    tokens = sum(len(answer.ids) for answer in answers)
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s")
    if arguments.json:
        rows: list[dict[str, Any]] = [
            {
                "prompt": p.shown,
                "answer": a.text,
                "tokens": len(a.ids),
                "finished": a.finished,
                "reference": p.reference,
            }
            for p, a in zip(prompts, answers)
        ]
        Path(arguments.json).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return 0


def prompts_of(arguments: argparse.Namespace, tokenizer: Any) -> list[Any]:
    from megatron_tide.data import PreparedData
    from megatron_tide.generate import from_prepared, read_prompts
    from megatron_tide.generate.prompts import from_text

    if arguments.file:
        return read_prompts(arguments.file, tokenizer, arguments.limit)
    if arguments.data:
        return from_prepared(PreparedData.open(arguments.data), tokenizer, arguments.limit)
    return [from_text(tokenizer, text, arguments.system) for text in arguments.prompt]


if __name__ == "__main__":
    cli.run(main)
