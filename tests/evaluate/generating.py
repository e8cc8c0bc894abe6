"""What the tests of generators share: how one is opened and asked, and a count of what reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.evaluate.generators import (
    Generator,
    open_generator,
)

PRESET = BenchmarkPreset(task="t", new_tokens=12, steps=6, chat_template=False)
PROMPTS = ["Print line 3.", "x", "Write a function that returns the largest number.", "for name in names:"]


def opened(path: Path, batch_size: int = 2, dtype: torch.dtype = torch.float32) -> Generator:
    return open_generator(str(path), dtype, "cpu", batch_size)


def requests(generator: Generator, prompts: list[str], preset: BenchmarkPreset = PRESET, **more: Any) -> list[Instance]:
    settings = {"until": [], "chat_template": preset.chat_template, **generator.settings(preset), **more}
    return [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]


def answers(generator: Any, prompts: list[str], preset: BenchmarkPreset = PRESET, **more: Any) -> list[str]:
    return generator.generate_until(requests(generator, prompts, preset, **more))


TURN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
TURN += "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


class Counted:
    """Counts the prompts that reach a generator, and stops it after some of them."""

    def __init__(self, generator: Any, stop_after: int | None = None) -> None:
        self.batches: list[int] = []
        self._complete, self._stop_after = generator._complete, stop_after
        generator._complete = self

    def __call__(self, model: Any, prompts: list[Any], asked: list[Any]) -> list[Any]:
        if self._stop_after is not None and sum(self.batches) >= self._stop_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        return self._complete(model, prompts, asked)
