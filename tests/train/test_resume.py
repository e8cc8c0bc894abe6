"""Resuming continues exactly: bit for bit in fp32 at the same world size, from any stage and offload to any other."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide import distill
from megatron_tide.config import from_flat
from megatron_tide.train.build import refuse_other_run
from megatron_tide.train.inputs import read_run_inputs
from tests.support.launch import ranks, run_command, steps_logged, wait_until
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve, train_and_tell

pytestmark = pytest.mark.ranks
BASE_FLAGS = {
    "micro_batch_size": 2,
    "max_steps": 6,
    "save_every": 3,
    "keep_last": 9,
    "temperature": 4.0,
    "strategy": "tide-cross",
    "weight_decay": 0.1,
}


def train(chain, out, world, **settings):
    return run_on_ranks(train_and_tell, world, chain.run(out, **{**BASE_FLAGS, **settings}), timeout=280)[0]


def all_tensors(run, step):
    folder = run / f"step-{step:08d}"
    files = ("model", "exp_avg", "exp_avg_sq")
    return {f"{f}/{n}": t for f in files for n, t in load_file(folder / f"{f}.safetensors").items()}


@pytest.fixture(scope="module")
def untouched(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("untouched")
    train(chain, out, 2)
    return out


def start_from(untouched, out, step):
    out.mkdir()
    shutil.copytree(untouched / f"step-{step:08d}", out / f"step-{step:08d}")
    return out


def test_same_world_is_bit_for_bit(chain, untouched, tmp_path):
    out = start_from(untouched, tmp_path / "run", 3)
    curve = train(chain, out, 2)
    assert curve["step"] == [4, 5, 6]
    assert curve["loss/total"] == read_curve(untouched)["loss/total"][3:]
    ours, theirs = all_tensors(out, 6), all_tensors(untouched, 6)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("world", "deepspeed"),
    [(1, "ds_configs/zero1.json"), (2, "ds_configs/zero2_offload.json"), (1, "ds_configs/zero2.json")],
)
def test_another_world_or_stage_follows(chain, untouched, tmp_path, world, deepspeed):
    out = start_from(untouched, tmp_path / "run", 3)
    curve = train(chain, out, world, deepspeed=deepspeed)
    expected = torch.tensor(read_curve(untouched)["loss/total"][3:])
    torch.testing.assert_close(torch.tensor(curve["loss/total"]), expected, rtol=0, atol=1e-5)


def test_bf16_resumes_bit_for_bit_from_its_master_weights(chain, tmp_path):
    whole = tmp_path / "whole"
    train(chain, whole, 1, precision="bf16")
    out = start_from(whole, tmp_path / "run", 3)
    train(chain, out, 1, precision="bf16")
    ours, theirs = all_tensors(out, 6), all_tensors(whole, 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_corrupt_checkpoint_is_named_and_the_one_before_it_taken(chain, untouched, tmp_path):
    out = start_from(untouched, tmp_path / "run", 3)
    shutil.copytree(untouched / "step-00000006", out / "step-00000006")
    with (out / "step-00000006" / "exp_avg.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55")
    finished = run(chain, out)
    assert finished.status == 0, finished.printed
    assert "step-00000006/exp_avg.safetensors: corrupt" in finished.printed
    assert "resuming from" in finished.printed
    assert "step-00000003" in finished.printed


def test_another_run_is_refused_by_name_of_the_setting(chain, untouched, tmp_path):
    out = start_from(untouched, tmp_path / "run", 3)
    before = sorted(p.name for p in out.iterdir())
    refused = run(chain, out, lr=1e-4)
    assert refused.status == 2
    assert refused.last_line.startswith("error: ")
    assert "lr = 0.003, this run has 0.0001" in refused.printed
    assert "Traceback" not in refused.printed
    assert sorted(p.name for p in out.iterdir()) == before


def test_another_teacher_of_the_same_tokenizer_is_refused(chain, untouched, tmp_path):
    out, teacher = start_from(untouched, tmp_path / "run", 3), tmp_path / "teacher"
    shutil.copytree(chain.root / "teacher", teacher)
    shard = next(teacher.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-4] ^= 1  # of one weight
    shard.write_bytes(content)
    refused = run(chain, out, teacher=teacher)
    assert refused.status == 2
    assert "was trained with another teacher" in refused.last_line


def test_resume_never_refuses_a_used_folder(chain, untouched, tmp_path):
    out = start_from(untouched, tmp_path / "run", 3)
    refused = run(chain, out, resume="never")
    assert refused.status == 2
    assert "already contains checkpoints" in refused.printed


def test_ctrl_c_saves_first_and_the_same_command_goes_on(chain, tmp_path):
    out = tmp_path / "run"
    with ranks(distill.main, flags(chain, out, max_steps=4000), 1, tmp_path) as (process,):
        wait_until(lambda: steps_logged(out) > 0, [process])
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    assert process.exitcode == 130
    assert "stopped on request, checkpoint saved" in (tmp_path / "rank0").read_text()
    saved = sorted(out.glob("step-*"))
    state = json.loads((saved[-1] / "trainer.json").read_text())["state"]
    assert 1 <= state["step"] < 4000
    assert read_curve(out)["step"][-1] == state["step"]


def flags(chain, out, **settings):
    return chain.flags(out, **{**BASE_FLAGS, **settings})


def run(chain, out, **settings):
    return run_command(distill.main, flags(chain, out, **settings), out.parent)


def in_turn(*runs):
    for flags in runs:
        train_and_tell(flags)


def test_a_run_in_two_parts_is_that_run_and_the_second_may_have_other_data(chain, tmp_path):
    """Bit for bit where the data are the same; what a resumed run may not change, the second part may not either."""
    small = {**BASE_FLAGS, "max_steps": 4, "micro_batch_size": 8}
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    parts = chain.run(first, **small, until_step=2), chain.run(second, **small, continue_from=str(first))
    run_on_ranks(in_turn, 1, chain.run(whole, **small), *parts, timeout=280)
    curves = [read_curve(out) for out in (whole, first, second)]
    for name in ("step", "loss/total", "train/lr", "tidal/strength"):
        assert curves[0][name] == curves[1][name] + curves[2][name]
    ours, theirs = all_tensors(second, 4), all_tensors(whole, 4)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    run, tail = json.loads((second / "run.json").read_text()), first / "step-00000002"
    elsewhere = {**run, "data_fingerprint": "other"}
    refuse_other_run(tail, elsewhere, on_its_data=False)
    for changed, error in (
        (elsewhere, "another data"),
        ({**run, "continued": None}, "began elsewhere"),
        ({**run, "student_fingerprint": "other"}, "another student"),
        ({**run, "affects_loss": {**run["affects_loss"], "lr": 1e-4}}, "lr = 0.003"),
    ):
        with pytest.raises(ValueError, match=error):
            refuse_other_run(second / "step-00000004", changed)
    with pytest.raises(ValueError, match="another total"):
        refuse_other_run(tail, {**run, "total_steps": 8}, on_its_data=False)
    stopped = json.loads((tail / "trainer.json").read_text())
    stopped["run"]["until_step"] = 3
    (tail / "trainer.json").write_text(json.dumps(stopped))
    for settings, error in (
        ({"continue_from": str(first)}, "is at step 2 of 3; run its own command first"),
        ({"continue_from": str(tail), "until_step": 2}, "--until-step 2: this run goes on from step 2 of 4"),
        ({"until_step": 5}, "--until-step 5"),
    ):
        with pytest.raises(ValueError, match=error):
            read_run_inputs(from_flat(chain.run(tmp_path / "third", **{**small, **settings})), 1)
