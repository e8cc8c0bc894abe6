"""Make a Hugging Face folder of a training checkpoint, and prove that it is the same model.

    python tools/convert_to_hf.py runs/quickstart/tide-cross runs/quickstart/hf
    python tools/convert_to_hf.py runs/NAME/step-00000500 out/ --dtype float32 --max-shard-size 2GB
    python tools/convert_to_hf.py runs/NAME/tide-cross out/ --push-to-hub me/my-student --private

The folder holds safetensors, config, tokenizer, generation config, the modelling code for trust_remote_code, and a
model card with the run's provenance. Before it appears, a fresh process loads it offline with transformers alone, and
its logits and greedy tokens must equal the training weights' exactly; otherwise nothing is left. No GPU is needed, and
memory for about one copy of the model. A checkpoint of any ZeRO stage and any number of ranks is converted alike.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_tide import cli


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step-* folder of a run, or the run's folder: its newest step")
    parser.add_argument("out", help="folder to make; refused when it exists, unless --overwrite")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"),
                        help="precision of the released weights [bfloat16]")  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file, e.g. 5GB or 500MiB [5GB]")
    parser.add_argument("--overwrite", action="store_true", help="replace the release at OUT once the new one is whole")
    parser.add_argument("--base-model", default=None, help="the folder the run began from, if it has moved since")
    parser.add_argument("--name", default=None, help="the model's name in its card [the name of OUT]")
    parser.add_argument("--license", default="apache-2.0", help="licence named in the card [apache-2.0]")
    parser.add_argument("--push-to-hub", metavar="NAME", help="then upload it to the hub, e.g. me/my-student")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make the repository private")
    arguments = parser.parse_args(argv)
    from megatron_tide.release import Hub, Options, convert, parse_size

    if arguments.private and not arguments.push_to_hub:
        raise ValueError("--private is for --push-to-hub NAME; give both or neither")
    hub = None
    if arguments.push_to_hub:  # asked now: a missing login should not be found out after the work
        hub = Hub(arguments.push_to_hub, private=arguments.private, overwrite=arguments.overwrite)
    options = Options(
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        overwrite=arguments.overwrite,
        base_model=arguments.base_model,
        name=arguments.name,
        license_id=arguments.license,
    )
    parity = convert(arguments.checkpoint, arguments.out, options)
    print(
        f"{arguments.out}: released; {parity['logit_rows']} rows of logits and {parity['greedy_tokens']} greedy tokens "
        f"equal the training weights' bit for bit"
    )
    if hub is not None:
        print(f"{arguments.out}: uploaded to {hub.push(Path(arguments.out))}")
    return 0


if __name__ == "__main__":
    cli.run(main)
