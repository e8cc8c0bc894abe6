"""One model's memory and speed in this process, which should be a fresh one: weights, peak while answering, seconds."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.machine import DEVICE_HELP, device_of, reset_peak, rss_bytes

PROMPT = "Write a Python function that returns the sum of a list of numbers."
NEW_TOKENS = 256  # of the published measurement
REPEATS = 3
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model, answering one prompt at a time.

    ``weights_bytes``: of every parameter, a shared one once. ``memory_bytes``: the peak of what ``memory_of`` says,
    while answering; ``process_bytes``: the process's peak resident memory, libraries included. ``seconds``: of each
    repeat, for ``tokens`` new tokens in ``passes`` forward passes. ``cannot``: why this model does not answer here
    (then there is no peak and no time), or nothing.
    """

    path: str
    model_type: str
    parameters: int
    weights_bytes: int
    block_size: int | None
    prompt_tokens: int
    cannot: str = ""
    memory_of: str = ""
    memory_bytes: int = 0
    process_bytes: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: tuple[float, ...] = ()

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.median_seconds


class Host:
    """Peak resident memory of this process, less what it held before the model was loaded."""

    def __init__(self) -> None:
        self._before = rss_bytes()
        self.what = (
            "peak resident memory while answering, less what the process held before it loaded the model (what "
            "libraries take at their first use is in it)"
        )

    def start(self) -> None:
        try:
            reset_peak()
        except OSError:  # a kernel or container without /proc/self/clear_refs
            self.what = self.what.replace("while answering", "while loading and answering")

    def peak(self) -> int:
        return rss_bytes("VmHWM") - self._before


class Accelerator:
    """Peak of what torch allocated on the GPU."""

    what = "peak memory allocated on the GPU while answering"

    def __init__(self, device: str) -> None:
        self._device = device

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated(self._device))


def measure(
    path: str, dtype: str, device: str, prompt: str, new_tokens: int, repeats: int, mask: str | None = None
) -> Measured:
    """Load ``path`` (as ``open_model`` takes it) in ``dtype`` on ``device`` and answer ``prompt`` ``repeats`` times.

    Exactly ``new_tokens`` come out each time, none of them an end of text, and each pass decides one: what their last
    block holds beyond them is decided too where the model is surer of it, so ``passes`` may be more. A short answer
    before warms up and is not counted. ``mask`` names the mask token where the tokenizer's own files do not.

    Raises:
        ValueError: no such model, or one that cannot be read.
    """
    import torch

    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.generate import complete
    from megatron_tide.generate.prompts import from_text
    from megatron_tide.models import DTYPES as TORCH_DTYPES
    from megatron_tide.training_checkpoint import open_model

    meter = Accelerator(device) if torch.device(device).type == "cuda" else Host()
    opened = open_model(path, TORCH_DTYPES[dtype], device)
    model, tokenizer = opened.model, load_tokenizer(opened.folder, mask_token=mask)
    ids = from_text(tokenizer, prompt).ids
    weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()
    about: dict[str, Any] = {
        "path": path,
        "model_type": model.config.model_type,
        "parameters": sum(weight.numel() for weight in weights),
        "weights_bytes": sum(weight.nbytes for weight in weights),
        "block_size": getattr(model.config, "block_size", None),
        "prompt_tokens": len(ids),
    }

    def answer(tokens: int) -> Any:
        (found,) = complete(model, tokenizer, [ids], batch_size=1, max_new_tokens=tokens, eos_token_ids=())
        return found

    try:
        answer(1)
    except ValueError as error:  # a model whose mask token nobody named, for instance
        return Measured(**about, cannot=str(error))
    meter.start()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        found = answer(new_tokens)
        seconds.append(time.perf_counter() - started)
    return Measured(
        **about,
        memory_of=meter.what,
        memory_bytes=meter.peak(),
        process_bytes=rss_bytes("VmHWM"),
        tokens=len(found.ids),
        passes=found.passes,
        seconds=tuple(seconds),
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What both this command and ``footprint`` take."""
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="precision of the weights [bfloat16]")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--prompt", default=PROMPT, help=f"what both are asked [{PROMPT!r}]")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help=f"tokens of each answer [{NEW_TOKENS}]")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"answers that are timed [{REPEATS}]")


def check(args: argparse.Namespace) -> None:
    """ValueError for a number of ``add_flags`` below 1."""
    for flag, number in (("--new-tokens", args.new_tokens), ("--repeats", args.repeats)):
        if number < 1:
            raise ValueError(f"{flag} {number}; give 1 or more")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tide.report.measure",
        description="Measure one model's memory and speed in this process. For student against teacher take "
        "python -m megatron_tide.report.footprint, which starts one such process for each.",
    )
    parser.add_argument("model", help="hub-format folder, hub name, run folder or step folder")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the numbers go")
    parser.add_argument("--mask", metavar="TOKEN", help="mask token or id, where the tokenizer names none")
    add_flags(parser)
    args = parser.parse_args(argv)
    check(args)
    device = device_of(args.device)
    found = measure(args.model, args.dtype, device, args.prompt, args.new_tokens, args.repeats, args.mask)
    args.json.write_text(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
