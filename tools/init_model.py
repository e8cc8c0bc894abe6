"""Make a model with random weights, as a Hugging Face folder with its tokenizer beside it.

Shapes come from a config.json (model_type a2d-qwen3 or llada2_moe). What depends on the vocabulary comes from the
tokenizer: the mask, end and padding ids always, and vocab_size where the config leaves it out, rounded up so that the
output head's matrix has a friendly shape. The same config, tokenizer and seed give the same weights.

  python tools/init_model.py --config recipes/quickstart/student.json --tokenizer runs/quickstart/tokenizers/student \\
      --seed 42 --out runs/quickstart/init/student
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.bridge import TextTokenizer, load_tokenizer

VOCAB_MULTIPLE = 64


def complete(config: dict[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The config with the tokenizer's ids and a vocab_size that holds all of them."""
    needed = tokenizer.vocab_size
    size = config.get("vocab_size", -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
    if size < needed:
        raise ValueError(f"the config's vocab_size {size} is smaller than the tokenizer's {needed}: leave it out")
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {**config, **ids, "vocab_size": size}


def make(config: Path, tokenizer: str, seed: int, out: Path, fresh: bool) -> int:
    """Write the folder ``out``, whole or not at all; -> the number of parameters."""
    from megatron_tide.files import read_json
    from megatron_tide.models import fresh_model, write_folder

    if out.exists() and any(out.iterdir()):
        if not (out / "config.json").exists():
            raise ValueError(f"{out}: exists and holds something else than a model; choose another --out")
        if not fresh:
            raise ValueError(f"{out}: already holds a model; pass --fresh to replace it")
    loaded = load_tokenizer(tokenizer)
    model = fresh_model(complete(read_json(config), loaded), seed)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_folder(model, part)
    loaded.save(part)
    shutil.rmtree(out, ignore_errors=True)
    part.replace(out)
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="JSON", help="shapes, as in a hub config.json")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder or hub name of the tokenizer")
    parser.add_argument("--seed", type=int, required=True, help="of the random weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--fresh", action="store_true", help="replace a model that --out already holds")
    options = parser.parse_args(argv)
    count = make(options.config, options.tokenizer, options.seed, options.out, options.fresh)
    print(f"{options.out}: {count / 1e6:.3f} M parameters, seed {options.seed}")


if __name__ == "__main__":
    cli.run(main)
