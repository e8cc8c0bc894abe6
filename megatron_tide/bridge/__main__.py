"""Build a bridge between two tokenizers: what turns a text into chunks that both sides can be compared on.

Compares the vocabularies, aligns a sample of the data with both tokenizers, and writes manifest.json and
vocab_map.safetensors. Refuses when too few of the sample's bytes lie in chunks: the two tokenizers then spell the same
text differently, and distillation would silently learn from a part of it. A finished bridge of the same tokenizers and
sample is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.bridge import Bridge, TextTokenizer, load_tokenizer
from megatron_tide.bridge.artefact import MANIFEST
from megatron_tide.bridge.samples import read_samples
from megatron_tide.bridge.summary import summary

COVERAGE_FLOOR = 0.98
SAMPLE_LIMIT = 2000


def parser() -> argparse.ArgumentParser:
    """The command line of the bridge builder."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tide.bridge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = "Hugging Face folder or hub name, SentencePiece .model, or .tiktoken file"
    parser.add_argument("--student", required=True, metavar="TOK", help=f"the student's tokenizer: {kinds}")
    parser.add_argument("--teacher", required=True, metavar="TOK", help="the teacher's, likewise")
    parser.add_argument(
        "--sample",
        required=True,
        nargs="+",
        type=Path,
        metavar="DATA",
        help="JSONL or Parquet with messages (or text), a plain text, or a folder of such",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the bridge")
    parser.add_argument(
        "--student-mask", metavar="STRING", help="the student's mask, where its files name none: token or id"
    )
    parser.add_argument("--teacher-mask", metavar="STRING", help="the teacher's, likewise")
    parser.add_argument(
        "--sample-limit", type=int, default=SAMPLE_LIMIT, help="texts to align from each file (default: %(default)s)"
    )
    parser.add_argument(
        "--coverage-floor",
        type=float,
        default=COVERAGE_FLOOR,
        help="smallest share of the sample's bytes that chunks must cover (default: %(default)s)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizers' own Python code run")
    parser.add_argument("--fresh", action="store_true", help="build again, replacing the bridge in DIR")
    return parser


def main(argv: list[str]) -> None:
    """Build, check and write a bridge, or find it done."""
    args = parser().parse_args(argv)
    if not 0 <= args.coverage_floor <= 1:
        raise ValueError(f"--coverage-floor must be a share from 0 to 1, not {args.coverage_floor}")
    if args.sample_limit < 1:
        raise ValueError(f"--sample-limit must be at least 1, not {args.sample_limit}")
    student = load_tokenizer(args.student, mask_token=args.student_mask, trust_remote_code=args.trust_remote_code)
    teacher = load_tokenizer(args.teacher, mask_token=args.teacher_mask, trust_remote_code=args.trust_remote_code)
    texts = read_samples(args.sample, args.sample_limit)
    request = {"sample_sha256": _digest(texts), "sample_limit": args.sample_limit}
    if not args.fresh and (args.out / MANIFEST).exists():
        bridge = _finished(args.out, student, teacher, request)
        verdict = "done, skipped"
    else:
        bridge = Bridge.build(student, teacher, texts, request=request)
        verdict = "built"
    bridge.require_coverage(args.coverage_floor)
    if verdict == "built":
        bridge.save(args.out)
    print("\n".join(summary(bridge)))
    print(f"{args.out}: {verdict}")


def _finished(out: Path, student: TextTokenizer, teacher: TextTokenizer, request: dict[str, Any]) -> Bridge:
    bridge = Bridge.load(out)
    try:
        bridge.check(student, teacher)
    except ValueError as error:
        raise ValueError(f"{out}: holds a bridge of other tokenizers; pass --fresh to replace it ({error})") from error
    if bridge.manifest["request"] != request:
        raise ValueError(f"{out}: holds a bridge measured on another sample; pass --fresh to replace it")
    return bridge


def _digest(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


if __name__ == "__main__":
    cli.run(main)
