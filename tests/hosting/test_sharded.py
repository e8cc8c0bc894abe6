"""Each rank really holds only its part of the teacher: measured as memory that living tensors have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_tide.train.distributed import DistContext
from tests.hosting.backends import hostings, joined, living_bytes, loader_of, start_counting, teacher_folder, teacher_of
from tests.support.disk import needs_disk_io
from tests.support.lab import stored
from tests.support.models import tiny_teacher_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks
LAYERS = 12
SLACK = 0.02  # of what is expected: alignment, router biases, the engine's own small tensors


@pytest.fixture(scope="module")
def tall(chain, tmp_path_factory):
    """Twelve layers, eleven of them of 4.8 MB: many times what a disk-hosted teacher may hold of them."""
    config = tiny_teacher_config(hidden_size=64, moe_intermediate_size=384, num_hidden_layers=LAYERS)
    return teacher_folder(chain.root / "teacher", tmp_path_factory.mktemp("tall"), config)


@pytest.fixture(scope="module")
def parts(tall):
    """Bytes of the parts of the checkpoint, in order: embedding, layers, head."""
    found = Counter()
    for key, tensor in stored(tall).items():
        names = key.split(".")
        layer = int(names[2]) + 1 if names[1] == "layers" else LAYERS + 1
        found[0 if "word_embeddings" in key else layer] += tensor.nbytes
    return [found[part] for part in range(LAYERS + 2)]


class Watched(DistContext):
    """A world that measures, instead of telling, what is loaded next."""

    def print_rank0(self, line: str) -> None:
        if line.startswith("teacher:"):
            self.__dict__.setdefault("seen", []).append(living_bytes())


def memory(flags, chosen):
    """By hosting: bytes held before each layer is loaded, after loading, after each sweep; whole layers in a sweep."""
    found = {}
    with joined() as world:
        for hosting, more in chosen.items():
            watched = Watched(world.rank, world.size, world.device, world.host_group)
            strategy, loader = loader_of(flags, world)
            asked = [loader(step) for step in range(3)]
            start_counting()
            teacher = teacher_of({**flags, **more}, strategy, watched)
            loaded, whole = living_bytes(), watch_layers(teacher) if hosting.startswith("zero3") else []
            swept = [living_bytes() for microbatches in asked if teacher.score(microbatches)]
            disk = sum(file.stat().st_size for file in Path(more.get("teacher_nvme", "/nowhere")).rglob("*.swp"))
            found[hosting] = {
                "while loading": watched.__dict__["seen"],
                "loaded": loaded,
                "swept": swept,
                "whole": whole,
                "on disk": disk,
            }
    return found


def watch_layers(teacher):
    """For every call of a layer: how many layers' weights are whole on this rank."""
    whole, flat_layers = [], list(teacher.engine.module.flat_layers)
    flats = [flat_layer.flat for flat_layer in flat_layers]  # asking a layer for it in a sweep would gather it

    def count(*_):
        whole.append(sum(flat.untyped_storage().nbytes() > 0 for flat in flats))

    for flat_layer in flat_layers:
        flat_layer.register_forward_pre_hook(count)
    return whole


@pytest.fixture(scope="module")
def measured(chain, tall, tmp_path_factory):
    """What :func:`memory` says on each of two ranks; the teacher's answers need no copy of its output embedding."""
    flags = chain.run(Path("nowhere"), teacher=str(tall), strategy="tide-cross")
    chosen = hostings(tmp_path_factory.mktemp("disk"))
    del chosen["pipeline_1"], chosen["pipeline_4"]
    return run_on_ranks(memory, 2, flags, chosen, timeout=280)


@pytest.mark.parametrize("hosting", ["zero3", "zero3_cpu"])
def test_a_rank_holds_its_share_of_every_unit(measured, parts, hosting):
    for rank in measured:
        held = rank[hosting]
        assert held["loaded"] == pytest.approx(sum(parts) / 2, rel=SLACK)
        assert held["swept"] == pytest.approx([sum(parts) / 2] * 3, rel=SLACK)
        for place, now in enumerate(held["while loading"]):
            # gloo's thread may still hold the layer before, whole
            assert 0 <= now - sum(parts[:place]) / 2 <= max(parts) * (1 + SLACK), "one layer after another"


@pytest.mark.parametrize("hosting", ["zero3", "zero3_cpu", pytest.param("zero3_nvme", marks=needs_disk_io)])
def test_a_sweep_has_the_unit_at_work_and_the_next_in_memory(measured, parts, hosting):
    for rank in measured:
        whole = rank[hosting]["whole"]
        assert len(whole) == 3 * len(parts)
        assert set(whole) <= {1, 2}


@needs_disk_io
def test_on_disk_only_buffers_stay_in_memory(measured, parts):
    """Two shares of the largest layer; layers whose share is under 1 MiB, which DeepSpeed does not put on disk."""
    small = [part for part in parts if part / 2 < 2**20]
    buffers = 2 * max(parts) / 2
    for rank in measured:
        held = rank["zero3_nvme"]
        bound = (buffers + sum(small) / 2) * (1 + SLACK) + parts[
            -1
        ]  # gloo's thread may still hold the last layer, whole
        assert held["loaded"] <= bound
        assert max(held["swept"]) <= bound < sum(parts) / 5
        assert held["on disk"] >= sum(parts) - sum(small)


def test_stages_are_balanced_by_bytes(measured, parts):
    stages = [rank["pipeline_2"]["loaded"] for rank in measured]
    optimum = min(max(sum(parts[:cut]), sum(parts[cut:])) for cut in range(1, len(parts)))
    assert sum(stages) == pytest.approx(sum(parts), rel=SLACK)
    assert max(stages) <= optimum * (1 + SLACK)
    for rank, held in zip(measured, stages):
        assert rank["pipeline_2"]["swept"] == pytest.approx([held] * 3, rel=SLACK)
