"""Create a model with random weights: a Hugging Face folder that includes its tokenizer.

Shapes come from a config.json (model_type a2d-qwen3, a2d-llama or llada2_moe). The ids of the mask, end and padding tokens come
from the tokenizer, and so does vocab_size if the config has none, rounded up to a multiple of 64. The same config,
tokenizer and seed give the same weights.

Examples:
  python -m megatron_tide init-model --config recipes/quickstart/student.json \\
      --tokenizer runs/quickstart/tokenizers/student --seed 42 --out runs/mine/init/student
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    config: Path = flag(..., "Model configuration in the form of a hub folder's config.json", metavar="JSON")
    tokenizer: str = flag(..., "Tokenizer: folder or hub name", metavar="DIR")
    block_size: int | None = flag(
        None, "Number of tokens denoised together", shown="that of --config, else the model type's", low=1
    )
    seed: int = flag(..., "Random seed for the weights")
    out: Path = flag(..., "Folder to write the model to", metavar="DIR")
    fresh: bool = flag(False, "Replace a model that is already in --out")


def run(args: Args) -> None:
    from megatron_tide.models.init_model import init_model

    count = init_model(args.config, args.tokenizer, args.seed, args.out, args.fresh, args.block_size)
    say(f"{args.out}: {count / 1e6:.3f} M parameters, seed {args.seed}")
