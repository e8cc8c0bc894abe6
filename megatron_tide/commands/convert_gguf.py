"""Write a release as one GGUF file for llama.cpp: a laptop's format, quantized if wanted.

`generate FILE.gguf` decodes it block by block (pip install -r requirements-gguf.txt). The release must be of Qwen3's
shape with a byte-level tokenizer; llama-quantize makes other mixtures from a bf16 file. Needs no GPU, and memory for
the largest tensor. Before the file appears, its settings and its tokenizer are read back.

Examples:
  python tools/convert_to_gguf.py runs/quickstart/hf student.gguf --type q8_0
  python -m megatron_tide generate student.gguf --chat
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    release: str = flag(..., "Release: a folder that convert wrote", kind="positional", reads="folder")
    out: Path = flag(..., "File to write; must not exist without --overwrite", kind="positional", writes="file")
    type: str = flag(
        "q8_0",
        "Type of the weights: as in the release (bf16), 8.5 or 4.5 bits each (q8_0, q4_0: the embeddings keep 8.5), or "
        "fp32. Matrices that blocks of 32 do not fit stay in bf16",
        choices=("bf16", "q8_0", "q4_0", "f32"),
    )
    overwrite: bool = flag(False, "Replace OUT when the new file is complete")


def run(args: Args) -> None:
    from megatron_tide.release.gguf import FALLBACK, convert_to_gguf

    kept = convert_to_gguf(args.release, args.out, args.type, overwrite=args.overwrite)
    say(f"{args.out}: written, {args.out.stat().st_size / 1e6:.1f} MB")
    if kept:
        say(f"{args.out}: {len(kept)} matrices with rows of no multiple of 32 stay in {FALLBACK} ({kept[0]}, ...)")
