"""Memory of a rank does not grow, however many windows its teacher has answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosting.hosts import host_of, hostings, joined, living_bytes, rss_bytes, start_counting, windows_of
from tests.support.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
WARM, SWEEPS = 50, 300
SLACK = 2**20  # bytes in 250 sweeps: 4 KiB a sweep, less than one hidden state of one micro-batch


def growth(knobs, chosen):
    """By hosting: bytes that resident memory, and that of tensors, grows by between sweep WARM and sweep SWEEPS."""
    found = {}
    with joined() as world:
        strategy, windows = windows_of(knobs, world)
        asked = [windows(step) for step in range(6)]
        for hosting, more in chosen.items():
            start_counting()
            host = host_of({**knobs, **more}, strategy, world)
            for sweep in range(SWEEPS + 1):
                if sweep == WARM:
                    before = rss_bytes(), living_bytes()
                host.score(asked[sweep % len(asked)])
                if sweep % 10 == 0:
                    host.read()  # as the loop does when a log line is due
            found[hosting] = rss_bytes() - before[0], living_bytes() - before[1]
    return found


def test_three_hundred_sweeps(chain, tmp_path):
    knobs = chain.run(Path("nowhere"), strategy="tide-bridge", micro_batch=1, global_batch=4)
    chosen = {name: hostings(tmp_path)[name] for name in ("zero3", "pipeline_2")}
    for found in run_on_ranks(growth, 2, knobs, chosen, timeout=280):
        assert found.keys() == chosen.keys()
        for hosting, (resident, tensors) in found.items():
            assert resident <= SLACK, hosting
            assert tensors == 0, hosting
