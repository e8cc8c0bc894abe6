"""The prompts of the paper's benchmarks, string by string: ``prompts.json`` holds what they have always been.

Problems are stand-ins in the public sets' format (``lm_data``), HumanEval's are its own; templates are the lab's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_tide.evaluate.benchmark_presets import PAPER, changed_preset
from megatron_tide.evaluate.generators import Generator, open_generator
from megatron_tide.evaluate.harness import EvalContext, run_benchmark
from tests.support.answering import write_autoregressive
from tests.support.lab import Lab
from tests.support.lm_data import LOCAL, write_task

PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["block diffusion", "autoregressive"])
def generator(lab: Lab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Generator:
    path = lab.student
    if request.param == "autoregressive":
        path = write_autoregressive(tmp_path_factory.mktemp("ar") / "ar", lab.student)
    found = open_generator(str(path), torch.float32, "cpu", batch_size=2)
    assert found.decoder == request.param
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_stay_the_same(generator: Generator, tmp_path: Path, name: str) -> None:
    benchmark, _, plain = name.partition(", ")
    preset = changed_preset(benchmark, "paper", {"chat_template": not plain, "new_tokens": 1})
    if benchmark in LOCAL:
        write_task(tmp_path / "tasks", benchmark)
    include = [str(tmp_path / "tasks")] if benchmark in LOCAL else []
    asked: list[str] = []
    tell = generator.generate_until
    context = EvalContext(
        name="m",
        path="p",
        generator=generator,
        folder=tmp_path / "out",
        limit=2,
        include_path=include,
        unsafe_programs=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "generate_until", lambda all: asked.extend(one.args[0] for one in all) or tell(all))
        run_benchmark(benchmark, preset, context)
    assert asked == PROMPTS[name]


def test_every_benchmark_is_covered() -> None:
    assert set(PROMPTS) == {f"{name}{suffix}" for name in PAPER for suffix in ("", ", no chat template")}
