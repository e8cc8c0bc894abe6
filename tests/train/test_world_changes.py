"""A run goes on at another number of ranks than it was stopped at: same batches, same noise, the same curve."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide import distill
from megatron_tide.config import from_flat
from megatron_tide.training_checkpoint import newest_complete
from tests.support.disk import small_disk
from tests.support.launch import ranks, steps_logged, wait_until
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve

pytestmark = pytest.mark.ranks
STEPS = 12
BASE_FLAGS = {"micro_batch_size": 2, "max_steps": STEPS, "strategy": "tide-bridge", "temperature": 4.0}


def train_until(settings, step):
    """Train on this rank; asked to stop once ``step`` steps are taken."""
    from megatron_tide.train import loop
    from megatron_tide.train.distributed import destroy_distributed, init_distributed

    plain = loop.global_counts

    def counts(microbatches, world, asked):
        return plain(microbatches, world, asked or world.trace.step > step)

    loop.global_counts = counts
    world = init_distributed()
    try:
        return distill.train(from_flat(settings), world)
    finally:
        destroy_distributed()


def test_four_two_one_four(chain, tmp_path):
    whole, parts = chain.run(tmp_path / "whole", **BASE_FLAGS), chain.run(tmp_path / "parts", **BASE_FLAGS)
    assert run_on_ranks(train_until, 2, whole, STEPS, timeout=200) == [0, 0]
    for world, step in ((4, 3), (2, 6), (1, 9), (4, STEPS)):
        ended = run_on_ranks(train_until, world, parts, step, timeout=280)
        assert ended == [0 if step == STEPS else 130] * world
        assert (tmp_path / "parts" / f"step-{step:08d}").is_dir()
    theirs, ours = (read_curve(tmp_path / name) for name in ("whole", "parts"))
    assert ours["step"] == theirs["step"] == list(range(1, STEPS + 1))
    torch.testing.assert_close(torch.tensor(ours["loss/total"]), torch.tensor(theirs["loss/total"]), rtol=0, atol=1e-4)
    last = [load_file(tmp_path / name / f"step-{STEPS:08d}" / "model.safetensors") for name in ("whole", "parts")]
    for name, tensor in last[0].items():
        torch.testing.assert_close(last[1][name], tensor, rtol=1e-3, atol=2e-4)


def test_a_small_disk_leaves_the_checkpoint_before_whole(chain, tmp_path):
    with small_disk(tmp_path / "disk", "800k") as disk:  # some checkpoints of the tiny student, and not nine
        check_small_disk(chain, disk / "run", tmp_path)


def check_small_disk(chain, out, tmp_path):
    flags = chain.flags(out, **{**BASE_FLAGS, "max_steps": 4000, "save_every": 1, "keep_last": 9})
    with ranks(distill.main, flags, 1, tmp_path) as processes:
        wait_until(lambda: processes[0].poll() is not None or steps_logged(out) > 90, processes)
        processes[0].join(30)
        assert processes[0].exitcode == 2
    printed = (tmp_path / "rank0").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "--resume auto" in line
    whole = newest_complete(out, print)
    assert whole is not None
    assert f"could not save {out}/step-{int(whole.name[5:]) + 1:08d}" in line
    assert not list(out.glob(".tide-tmp-*"))
