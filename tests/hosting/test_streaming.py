"""A teacher many times larger than the allowance is taken in and asked; the process measures itself."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

from tests.hosting.backends import hostings, joined, loader_of, rss_bytes, teacher_of
from tests.support.disk import needs_disk_io
from tests.support.models import stream_hub_folder, tiny_teacher_config
from tests.support.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.ranks, needs_disk_io]
LAYERS = 40
# What is no weight: the engine, the question under way, memory that was given back but lies between what was not.
REST = 48 * 2**20
QUESTION = {"micro_batch_size": 1, "global_batch_size": 2}


@pytest.fixture
def large(chain, tmp_path):
    """A teacher of 40 layers of 37 MB in bf16: its folder, its bytes, and those of its largest layer."""
    folder = tmp_path / "large"
    vocabulary = json.loads((chain.root / "teacher" / "config.json").read_text())["vocab_size"]
    config = tiny_teacher_config(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        moe_intermediate_size=1472,
        num_experts=8,  # and every token to all of them: torch keeps a kernel for each number of rows there ever was
        num_experts_per_tok=8,
        topk_group=4,
    )
    sizes = stream_hub_folder(folder, config, torch.bfloat16)
    for file in (chain.root / "teacher").glob("tokenizer*"):
        shutil.copy(file, folder)
    yield folder, sum(sizes.values()), max(sizes.values())
    shutil.rmtree(folder)


class Peak:
    """The highest anonymous memory of this process while inside, above that at the start, in bytes."""

    def __enter__(self):
        self.start = self.highest = rss_bytes()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.stopped.wait(0.002):
            self.highest = max(self.highest, rss_bytes())

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.growth = self.highest - self.start


def take_in_and_ask(flags):
    """Bytes by which memory grows while the teacher is taken in, and while it is asked twice."""
    with joined() as world:
        strategy, loader = loader_of(flags, world)
        asked = loader(0)
        with Peak() as loading:
            teacher = teacher_of(flags, strategy, world)
        with Peak() as sweeping:
            outputs = [output for _ in range(2) for output in teacher.score(asked)]
        assert all(bool(output.target_logprobs.isfinite().all()) for output in outputs)
        return loading.growth, sweeping.growth, sum(len(output.target_logprobs) for output in outputs)


def test_memory_is_bounded_by_a_few_layers(chain, large, tmp_path):
    """Two buffers for what comes from disk, and while loading the layer that is read and one that is being let go."""
    folder, total, layer = large
    allowance = 4 * layer + REST
    assert total > 7 * allowance
    flags = chain.run(Path("nowhere"), teacher=str(folder), teacher_dtype="bf16", strategy="tide-cross", **QUESTION)
    ((loading, sweeping, scored),) = run_on_ranks(
        take_in_and_ask, 1, flags | hostings(tmp_path)["zero3_nvme"], timeout=280
    )
    assert scored > 0
    assert loading <= allowance
    assert loading + sweeping <= allowance
