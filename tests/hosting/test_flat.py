"""Memory of a rank does not grow, however many steps its teacher has scored."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.hosting.backends import hostings, joined, living_bytes, loader_of, rss_bytes, start_counting, teacher_of
from tests.support.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
WARM, SWEEPS = 50, 300
# Bytes in 250 sweeps: 24 KiB a sweep, less than one hidden state of a micro-batch. The allocator needs some to settle:
# of 1,200 sweeps the first 400 took 4 MB, the others nothing.
SLACK = 6 * 2**20


def growth(flags, chosen):
    """By hosting: what grows between sweep WARM and SWEEPS: bytes of process and tensors, number of objects."""
    found = {}
    with joined() as world:
        strategy, loader = loader_of(flags, world)
        asked = [loader(step) for step in range(6)]
        for hosting, more in chosen.items():
            start_counting()
            teacher = teacher_of({**flags, **more}, strategy, world)
            for sweep in range(SWEEPS + 1):
                if sweep == WARM:
                    before = measure()
                teacher.score(asked[sweep % len(asked)])
                if sweep % 10 == 0:
                    teacher.metrics()  # as the loop does when a log line is due
            found[hosting] = [now - then for now, then in zip(measure(), before)]
    return found


def measure():
    return rss_bytes(), living_bytes(), len(gc.get_objects())


def test_three_hundred_sweeps(chain, tmp_path):
    flags = chain.run(Path("nowhere"), strategy="tide-bridge", micro_batch_size=1, global_batch_size=4)
    chosen = {name: hostings(tmp_path)[name] for name in ("zero3", "pipeline_2")}
    for found in run_on_ranks(growth, 2, flags, chosen, timeout=280):
        assert found.keys() == chosen.keys()
        for hosting, (rss, tensors, objects) in found.items():
            assert rss <= SLACK, hosting
            assert tensors < 8 * (SWEEPS - WARM), f"{hosting}: one number a sweep would be a leak"
            assert objects < SWEEPS - WARM, f"{hosting}: one a sweep would be a leak"
