"""Create a model to train, from another model or with random weights: a folder with its tokenizer.

--from SOURCE takes weights, tokenizer, chat template, end and padding tokens of an autoregressive model (Qwen3 or
Llama: a folder in hub format, a hub name, or a .gguf file of Llama's shape) or of a block diffusion one. The mask token
is the tokenizer's own, or added to it; where it is new to the model, its embedding starts as the mean of all. --as-is
only converts a .gguf file: its autoregressive model in hub format, for a teacher or a baseline.

--config JSON makes random weights: shapes come from a config.json (model_type a2d-qwen3, a2d-llama or llada2_moe). The
ids of the mask, end and padding tokens come from the tokenizer, and so does vocab_size if the config has none, rounded
up to a multiple of 64. The same config, tokenizer and seed give the same weights.

Examples:
  python -m megatron_tide init-model --from Qwen/Qwen3-0.6B --block-size 32 --out runs/mine/student
  python -m megatron_tide init-model --from runs/mine/hf --keep-layers 2/3 --out runs/mine/small
  python -m megatron_tide init-model --from SmolLM2-135M-Instruct.gguf --mask-token "<reponame>" --block-size 4 \\
      --out runs/mine/small
  python -m megatron_tide init-model --config recipes/quickstart/student.json \\
      --tokenizer runs/quickstart/tokenizers/student --seed 42 --out runs/mine/init/student
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_tide.cli import flag, flag_name, say
from megatron_tide.commands import BLOCK


@dataclass(frozen=True, kw_only=True)
class SourceArgs:
    """From an existing model."""

    from_: str | None = flag(
        None, "Model to start from: folder in hub format, hub name, or .gguf file", metavar="SOURCE"
    )
    mask_token: str | None = flag(
        None,
        "Mask token: a new token, or the string or id of an unused token of the vocabulary",
        metavar="TOKEN",
        shown="the tokenizer's own; <|mask|> if it has none",
    )
    keep_layers: str | None = flag(
        None,
        "Layers to keep: K/N of them, without those in the middle (2/3), or numbers and ranges (0-7,18-29)",
        metavar="LAYERS",
        shown="all",
    )
    as_is: bool | None = flag(None, "Write the autoregressive model of a .gguf file unchanged", shown="off")


@dataclass(frozen=True, kw_only=True)
class RandomArgs:
    """With random weights."""

    config: Path | None = flag(None, "Model configuration in the form of a hub folder's config.json", metavar="JSON")
    tokenizer: str | None = flag(None, "Tokenizer: folder or hub name", metavar="DIR")
    seed: int | None = flag(None, "Random seed for the weights", low=0)


@dataclass(frozen=True, kw_only=True)
class Args:
    source: SourceArgs
    random: RandomArgs
    block_size: int | None = flag(
        None, "Number of tokens denoised together", shown=f"that of SOURCE or --config, else {BLOCK}", low=1, high=4096
    )
    out: Path = flag(..., "Folder to write the model to", metavar="DIR")
    fresh: bool = flag(False, "Replace a model that is already in --out")


def run(args: Args) -> None:
    start, random = args.source, args.random
    unused = random if start.from_ is not None else start
    for info in fields(unused):
        if getattr(unused, info.name) is not None:
            raise ValueError(
                f"{flag_name(info)} needs --{'config' if unused is random else 'from'}; use one of the two ways"
            )
    if start.from_ is not None and start.as_is:
        changes = {
            "--mask-token": start.mask_token,
            "--keep-layers": start.keep_layers,
            "--block-size": args.block_size,
        }
        if given := [name for name, value in changes.items() if value is not None]:
            raise ValueError(f"{given[0]} changes the model, and --as-is does not; leave one of them out")
        from megatron_tide.models.student_from import unchanged

        unchanged(start.from_, args.out, args.fresh)
        return
    if start.from_ is not None:
        from megatron_tide.models.student_from import StudentOptions, student_from

        options = StudentOptions(block_size=args.block_size, mask_token=start.mask_token, keep_layers=start.keep_layers)
        model = student_from(start.from_, args.out, options, args.fresh)
        config, count = model.config, sum(parameter.numel() for parameter in model.parameters())
        say(
            f"{args.out}: {count / 1e6:.3f} M parameters, {config.num_hidden_layers} layers, blocks of "
            f"{config.block_size}, mask {config.mask_token_id}, from {start.from_}"
        )
        return
    if random.config is None or random.tokenizer is None or random.seed is None:
        raise ValueError("missing --from, or all of --config, --tokenizer and --seed (see --help)")
    from megatron_tide.models.init_model import init_model

    count = init_model(random.config, random.tokenizer, random.seed, args.out, args.fresh, args.block_size)
    say(f"{args.out}: {count / 1e6:.3f} M parameters, seed {random.seed}")
