"""Inference benchmark: memory and speed of student and teacher, one prompt at a time, each in a fresh process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_tide.files import read_json, write_json
from megatron_tide.machine import machine, reset_peak, rss_bytes, versions
from megatron_tide.workers import workers

MODELS = ("student", "teacher")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model, answering one prompt at a time.

    ``weights_bytes``: of every parameter, a shared one once. ``memory_bytes``: the peak while answering of what
    ``memory_of`` says; ``process_bytes``: the process's peak resident memory, libraries included. ``seconds``: of each
    repeat, for ``tokens`` new tokens in ``passes`` forward passes. ``cannot``: why this model does not answer here
    (then there is no peak and no time), or empty.
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


@dataclass(frozen=True, kw_only=True)
class InferenceBenchmark:
    """What was measured, and how: ``settings``, ``machine`` and ``versions`` are for the reader."""

    student: Measured
    teacher: Measured
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    def ratios(self) -> dict[str, float]:
        """Weights, memory and seconds of the teacher over the student's; weights only where one cannot answer."""
        found = {"weights": self.teacher.weights_bytes / self.student.weights_bytes}
        if not (self.student.cannot or self.teacher.cannot):
            found["memory"] = self.teacher.memory_bytes / max(self.student.memory_bytes, 1)
            found["seconds"] = self.teacher.median_seconds / self.student.median_seconds
        return found

    def write(self, path: Path) -> None:
        write_json(path, {**asdict(self), "ratios": self.ratios()})

    def summary(self) -> list[str]:
        """For people, one line per model and one of ratios."""
        lines = []
        for name in MODELS:
            model = getattr(self, name)
            line = f"{name}: {model.parameters:,} parameters, {model.weights_bytes / 1e6:.1f} MB of weights, "
            if model.cannot:
                lines.append(f"{line}not measured further: {model.cannot}")
            else:
                seconds = f"{model.median_seconds:.2f} s for {model.tokens} tokens"
                lines.append(f"{line}{model.memory_bytes / 1e6:.1f} MB while answering, {seconds}")
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in self.ratios().items())
        return [*lines, f"teacher / student: {ratios}"]


def read_inference_benchmark(path: Path) -> InferenceBenchmark:
    """What ``InferenceBenchmark.write`` wrote. ValueError, one line, for any other file."""
    content = read_json(path)
    try:
        content |= {name: Measured(**content[name]) for name in MODELS}
        return InferenceBenchmark(**{key.name: content[key.name] for key in fields(InferenceBenchmark)})
    except (KeyError, TypeError) as error:
        writer = "python -m megatron_tide inference-benchmark"
        raise ValueError(f"{path}: not what {writer} writes ({error!r})") from None


class HostMemory:
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


class GpuMemory:
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

    Each answer is exactly ``new_tokens`` long (no end of text), one token decided per pass; tokens of the last block
    beyond that are decided too where the model is surer of them, so ``passes`` may be more. A short answer before warms
    up and is not counted. ``mask`` names the mask token where the tokenizer's own files do not.

    Raises:
        ValueError: no such model, or one that cannot be read.
    """
    import torch

    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.generate import complete, from_text
    from megatron_tide.models import DTYPES
    from megatron_tide.training_checkpoint import open_model

    meter = GpuMemory(device) if torch.device(device).type == "cuda" else HostMemory()
    opened = open_model(path, DTYPES[dtype], device)
    model, tokenizer = opened.model, load_tokenizer(opened.folder, mask_token=mask)
    ids = from_text(tokenizer, prompt).ids
    about = {"path": path, "prompt_tokens": len(ids), **_facts(model)}

    def answer(tokens: int) -> Any:
        (found,) = complete(model, tokenizer, [ids], batch_size=1, max_new_tokens=tokens, eos_token_ids=())
        return found

    try:
        answer(1)
    except ValueError as error:  # for instance, a model without a known mask token
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


def _facts(model: Any) -> dict[str, Any]:
    """Type and size of a model; a shared weight counts once."""
    weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()
    return {
        "model_type": model.config.model_type,
        "parameters": sum(weight.numel() for weight in weights),
        "weights_bytes": sum(weight.nbytes for weight in weights),
        "block_size": getattr(model.config, "block_size", None),
    }


def measure_apart(path: str, settings: Mapping[str, Any], mask: str | None) -> Measured:
    """``measure`` in a process of its own, so that only this model's memory counts.

    Raises:
        ValueError: as ``measure``, or that process died.
    """
    with workers(1) as fresh:
        try:
            return fresh.submit(measure, path, **settings, mask=mask).result()
        except BrokenProcessPool:
            raise ValueError(f"{path}: the process that measured it died, most likely out of memory") from None


def compare(
    student: tuple[str, str | None], teacher: tuple[str, str | None], settings: Mapping[str, Any]
) -> InferenceBenchmark:
    """Both models, each a path and its mask token or None; ``settings`` are arguments of ``measure``."""
    return InferenceBenchmark(
        student=measure_apart(student[0], settings, student[1]),
        teacher=measure_apart(teacher[0], settings, teacher[1]),
        settings={**settings, "batch": 1, "tokens_per_pass": 1},
        machine=machine(),
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
    )
