"""A batch that is not finite: left out on all ranks together, named, and not more than ten in a row."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.train.nonfinite import PATIENCE
from megatron_tide.training_checkpoint import newest_complete
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve, train_and_tell

pytestmark = pytest.mark.ranks
BASE_FLAGS = {"micro_batch_size": 2, "max_steps": 5, "save_every": 1, "keep_last": 9, "strategy": "tide-cross"}


def train_poisoned(flags, rank, steps):
    """Train; on ``rank`` the second micro-batch of each of ``steps`` has timesteps that are no numbers."""
    from dataclasses import replace

    from megatron_tide.train.microbatches import MicrobatchLoader

    plain = MicrobatchLoader.__call__

    def poisoned(self, step):
        microbatches = plain(self, step)
        if self.rank == rank and step in steps:
            microbatches[1] = replace(
                microbatches[1], inverse_weight=torch.full_like(microbatches[1].inverse_weight, float("nan"))
            )
        return microbatches

    MicrobatchLoader.__call__ = poisoned
    try:
        return train_and_tell(flags)
    except ValueError as error:
        return str(error)


def tensors(run, step):
    folder = run / f"step-{step:08d}"
    return {f"{f}/{n}": t for f in ("model", "exp_avg") for n, t in load_file(folder / f"{f}.safetensors").items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run_bad_step(chain, out, rank, precision, deepspeed):
    """A run of two ranks whose third step is bad on ``rank``."""
    more = {"precision": precision, "deepspeed": f"ds_configs/{deepspeed}.json"}
    curves = run_on_ranks(train_poisoned, 2, chain.run(out, **BASE_FLAGS, **more), rank, [2], timeout=280)
    assert curves[0]["step"] == [1, 2, 4, 5], "step 3 has no losses to log"
    assert torch.tensor(curves[0]["loss/total"]).isfinite().all()
    assert not (out / "step-00000003").exists()
    return out


@pytest.mark.parametrize(("precision", "deepspeed"), [("bf16", "zero1"), ("bf16", "zero2"), ("fp32", "zero2_offload")])
def test_a_bad_batch_leaves_the_step_out(chain, tmp_path, precision, deepspeed):
    out = run_bad_step(chain, tmp_path, 1, precision, deepspeed)
    assert all(tensor.isfinite().all() for tensor in tensors(out, 5).values())
    assert not same(tensors(out, 4), tensors(out, 2))


def test_on_all_ranks_whichever_has_it(chain, tmp_path):
    """Had the other rank's samples been used, the two runs would differ from then on."""
    runs = [run_bad_step(chain, tmp_path / str(rank), rank, "fp32", "zero1") for rank in (0, 1)]
    assert same(tensors(runs[0], 5), tensors(runs[1], 5))


def test_the_samples_are_named(chain, tmp_path):
    flags = chain.run(tmp_path, **BASE_FLAGS)
    run_on_ranks(train_poisoned, 2, flags, 1, [2], timeout=280)
    (record,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    from megatron_tide.train.inputs import read_run_inputs

    inputs = read_run_inputs(from_flat(flags), 2)
    keys = PreparedData.open(flags["data"]).stats.keys
    bad = list(inputs.sampler.microbatches(2, 1))[1]
    assert record == {"step": 3, "ranks": {"1": [int(keys[index]) for index in bad]}}


def test_after_ten_in_a_row_the_run_ends_with_a_checkpoint_from_before(chain, tmp_path):
    flags = chain.run(tmp_path, **{**BASE_FLAGS, "max_steps": 30})
    for said in run_on_ranks(train_poisoned, 2, flags, 1, range(3, 30), timeout=280):
        assert said.startswith(f"steps 4 to {3 + PATIENCE} were not finite, 10 in a row; the checkpoint of step 3 is")
        assert "\n" not in said
    newest = newest_complete(tmp_path, print)
    assert newest is not None
    assert newest.name == "step-00000003"
    assert read_curve(tmp_path)["step"] == [1, 2, 3]


def test_a_row_that_ends_is_forgiven(chain, tmp_path):
    flags = chain.run(tmp_path, **{**BASE_FLAGS, "max_steps": 22, "save_every": 99})
    bad = [*range(1, PATIENCE), *range(PATIENCE + 1, 2 * PATIENCE)]
    curve = run_on_ranks(train_poisoned, 1, flags, 0, bad, timeout=280)[0]
    assert curve["step"] == [1, PATIENCE + 1, 2 * PATIENCE + 1, 2 * PATIENCE + 2]
