"""Convert a training checkpoint to a Hugging Face folder, and verify that it is the same model.

The folder holds safetensors, config, tokenizer, generation config, the modelling code for trust_remote_code, and a
model card with the run's provenance. Before it is published, a new process loads it offline with only transformers, and
its logits and greedy tokens must equal those of the training weights exactly; otherwise no folder is written. Needs no
GPU, and memory for about one copy of the model. Works for any ZeRO stage and number of ranks.

Examples:
  python tools/convert_to_hf.py runs/quickstart/tide-cross runs/quickstart/hf
  python -m megatron_tide convert runs/NAME/step-00000500 out/ --dtype float32 --max-shard-size 2GB
  python -m megatron_tide convert runs/NAME/tide-cross out/ --push-to-hub me/my-student --private
  python tools/convert_to_hf.py runs/NAME/tide-cross served/ --format sdar
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    checkpoint: str = flag(
        ..., "step-* folder of a run, or a run folder (its newest step)", kind="positional", reads="folder"
    )
    out: Path = flag(..., "Folder to write; must not exist without --overwrite", kind="positional")
    dtype: str = flag("bfloat16", "Precision of the released weights", choices=("bfloat16", "float16", "float32"))
    format: str = flag(
        "",
        "Model type to write it as. sdar: what SGLang, LMDeploy, Diffulex and JetEngine load, for a student of Qwen3's "
        "shape with mask token 151669",
        metavar="TYPE",
        shown="that of the training",
    )
    max_shard_size: str = flag("5GB", "Maximum size of a weight file, e.g. 5GB or 500MiB", metavar="SIZE")
    overwrite: bool = flag(False, "Replace the release in OUT when the new one is complete")
    base_model: str | None = flag(
        None, "Folder of the model that training started from, if it is no longer at its recorded path", metavar="DIR"
    )
    name: str | None = flag(None, "Name of the model in its card", shown="the name of OUT")
    license: str = flag("apache-2.0", "Licence for the model card")
    language: tuple[str, ...] = flag(
        (), "Language of the data, for the model card; repeatable", metavar="CODE", shown="en", kind="repeated"
    )
    skip_parity: bool = flag(False, "Skip the comparison with the training weights: to train further, not to publish")
    push_to_hub: str | None = flag(None, "Hub repository to upload the release to, e.g. me/my-student", metavar="NAME")
    private: bool = flag(False, "Make the repository of --push-to-hub private")


def run(args: Args) -> None:
    if args.push_to_hub == "":
        raise ValueError("--push-to-hub: the name is empty; give one such as me/my-student, or leave the flag out")
    if args.private and not args.push_to_hub:
        raise ValueError("--private needs --push-to-hub NAME; give both or neither")
    if args.skip_parity and args.push_to_hub:
        raise ValueError("--push-to-hub uploads only what passed the parity gate; leave out --skip-parity")
    from megatron_tide.release import Hub, Options, convert, parse_size

    hub = None
    if args.push_to_hub:  # now, so that a missing login stops the command before the work
        hub = Hub(args.push_to_hub, private=args.private, overwrite=args.overwrite)
    options = Options(
        dtype=args.dtype,
        format=args.format,
        max_shard_bytes=parse_size(args.max_shard_size),
        overwrite=args.overwrite,
        base_model=args.base_model,
        name=args.name,
        license_id=args.license,
        repository=args.push_to_hub,
        languages=args.language or ("en",),
        skip_parity=args.skip_parity,
    )
    parity = convert(args.checkpoint, args.out, options)
    if not parity:
        say(f"{args.out}: written, without the parity gate")
        return
    say(
        f"{args.out}: released; {parity['logit_rows']} rows of logits and {parity['greedy_tokens']} greedy tokens "
        f"equal the training weights' bit for bit"
    )
    if hub is not None:
        say(f"{args.out}: uploaded to {hub.push(args.out)}")
