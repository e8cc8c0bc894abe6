"""A run's curve is the same wherever its teacher is."""

from __future__ import annotations

import pytest
import torch

from tests.hosting.backends import hostings
from tests.support.disk import needs_disk_io
from tests.support.ranks import run_on_ranks
from tests.support.runs import train_and_tell

pytestmark = pytest.mark.ranks
STEPS = 20


def curve_of(chain, teacher, out, **flags):
    """Two ranks, two micro-batches a step on each, an objective that asks for everything, and is heard."""
    flags |= {"strategy": "tide-bridge", "temperature": 1.0, "tidal": "off", "micro_batch_size": 2}
    run = chain.run(out, teacher=str(teacher), max_steps=STEPS, **flags)
    return run_on_ranks(train_and_tell, 2, run, timeout=280)[0]


@pytest.fixture(scope="module")
def replicated(chain, mixture, tmp_path_factory):
    curve = curve_of(chain, mixture, tmp_path_factory.mktemp("replicated"))
    distilled = curve["loss/distill"]
    assert len(distilled) == STEPS
    assert min(distilled) > 0.1, "the teacher should count"
    return curve


@pytest.mark.parametrize("hosting", ["zero3", pytest.param("zero3_nvme", marks=needs_disk_io), "pipeline_2"])
def test_twenty_steps_agree(chain, mixture, replicated, tmp_path, hosting):
    curve = curve_of(chain, mixture, tmp_path / "run", **hostings(tmp_path)[hosting])
    for name in ("loss/total", "loss/distill", "train/grad_norm"):
        torch.testing.assert_close(torch.tensor(curve[name]), torch.tensor(replicated[name]), rtol=0, atol=1e-5)
    assert ("teacher/pipeline_bubble" in curve) == hosting.startswith("pipeline")
    assert all(0 <= bubble <= 1 for bubble in curve.get("teacher/pipeline_bubble", []))
