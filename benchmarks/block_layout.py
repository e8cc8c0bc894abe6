"""Which block layout a student trained here should be decoded in: that of its training, or the published sampler's.

    python -m benchmarks.block_layout --data runs/quickstart/test-data --student runs/quickstart/hf \\
        --json benchmarks/results/block_layout.json

Both layouts score the same masks of the same samples: bits per byte, masked-token accuracy, the difference with its
paired 95 % interval over samples, and completions that parse and say something.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from megatron_tide import cli
from megatron_tide.choices import BLOCK_LAYOUTS
from megatron_tide.data import PreparedData
from megatron_tide.evaluate.comparison import LikelihoodSettings, measure_model


def both_layouts(path: str, how: LikelihoodSettings) -> dict[str, Any]:
    """The figures of one student."""
    rows = {layout: measure_model(path, path, "student", replace(how, block_layout=layout)) for layout in BLOCK_LAYOUTS}
    found: dict[str, Any] = {
        layout: {
            "bits_per_byte": row.report.bits_per_byte.to_dict(),
            "masked_token_accuracy": row.report.accuracy.to_dict(),
            **({"parse_and_say_something": row.completions.to_dict(how.seed)["both"]} if row.completions else {}),
        }
        for layout, row in rows.items()
    }
    return found | {"answer minus sequence": rows["answer"].report.minus(rows["sequence"].report).to_dict()}


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared data that no student was trained on")
    parser.add_argument("--student", action="append", required=True, help="a model folder; repeatable")
    parser.add_argument("--samples", type=int, default=160, help="number of samples")
    parser.add_argument("--completions", type=int, default=150, help="number of prompts to complete")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    data = PreparedData.open(arguments.data)
    how = LikelihoodSettings(
        data=data,
        teacher_context="staircase",
        samples=arguments.samples,
        mc_samples=8,
        noise="sample",
        seed=0,
        batch_size=16,
        dtype=torch.float32,
        device="cpu",
        completions=arguments.completions,
        decoding={"max_new_tokens": 96, "min_new_tokens": 16, "eos_in_order": True},
    )
    aligned = [
        data.sample(int(index)).student.prompt % data.manifest["student"]["block"] == 0 for index in range(len(data))
    ]
    figures = {
        "block": data.manifest["student"]["block"],
        "samples": arguments.samples,
        "completions": arguments.completions,
        "prompts that end with a block, share": sum(aligned) / len(aligned),
        "students": {Path(path).name: both_layouts(path, how) for path in arguments.student},
    }
    report("block layout", figures, arguments.json)


if __name__ == "__main__":
    cli.run(main)
