"""AR -> joint -> distillation with growing blocks: any topology, exact resume, releases of the data's block size."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide.release import Options, convert
from megatron_tide.train.build import refuse_other_run
from megatron_tide.training_checkpoint import open_checkpoint, open_model
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve, train_and_tell

pytestmark = pytest.mark.ranks
STEPS = 9
BASE_FLAGS = {
    "strategy": "tide-bridge",
    "temperature": 4.0,
    "max_steps": STEPS,
    "pretraining": "ar:0.34,joint:0.33",  # three steps each
    "block_growth": "2:0.5,4:0.3",
    "score_prompt": True,
    "save_every": 1,
    "keep_last": 20,
}


def train(chain, out, world=1, **flags):
    return run_on_ranks(train_and_tell, world, chain.run(out, **{**BASE_FLAGS, **flags}), timeout=280)[0]


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(chain, out)
    return out


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run, step):
    folder = run / f"step-{step:08d}"
    files = ("model", "exp_avg", "exp_avg_sq")
    return {f"{f}/{n}": t for f in files for n, t in load_file(folder / f"{f}.safetensors").items()}


def test_each_phase_logs_what_it_computes(whole):
    ar, joint, last = rows(whole)[:3], rows(whole)[3:6], rows(whole)[6:]
    for row in ar:
        assert row["loss/total"] == pytest.approx(row["loss/next_token"])
        assert not [name for name in row if "denoise" in name]
    for row in joint:
        assert row["loss/total"] == pytest.approx(row["loss/next_token"] + row["loss/denoise"])
    for row in last:
        assert "loss/next_token" not in row
        assert row["loss/distill"] > 0
    assert not any("tidal/strength" in row or row["time/teacher_share"] > 0.2 for row in ar + joint)
    assert [row["train/phase"] for row in rows(whole)] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["train/block_size"] for row in rows(whole)] == [2] * 4 + [4] * 3 + [8] * 2
    assert ar[2]["loss/next_token"] < ar[0]["loss/next_token"]


@pytest.mark.parametrize(("world", "micro"), [(2, 4), (1, 8), (1, 1), (2, 2)])
def test_same_curve(chain, whole, tmp_path, world, micro):
    curve = train(chain, tmp_path, world, micro_batch_size=micro, save_every=100)
    torch.testing.assert_close(
        torch.tensor(curve["loss/total"]), torch.tensor(read_curve(whole)["loss/total"]), rtol=0, atol=2e-5
    )
    for name, tensor in load_file(tmp_path / f"step-{STEPS:08d}" / "model.safetensors").items():
        expected = load_file(whole / f"step-{STEPS:08d}" / "model.safetensors")[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("step", [1, 3, 5, 6, 8], ids=["ar", "ar-ends", "joint", "joint-ends", "distillation"])
def test_resumes_bit_for_bit(chain, whole, tmp_path, step):
    shutil.copytree(whole / f"step-{step:08d}", tmp_path / f"step-{step:08d}")
    curve = train(chain, tmp_path)
    assert curve["loss/total"] == read_curve(whole)["loss/total"][step:]
    ours, theirs = tensors(tmp_path, STEPS), tensors(whole, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_before_the_flags_had_their_defaults(chain, tmp_path):
    out = tmp_path / "run"
    plain = {"pretraining": "", "block_growth": "", "score_prompt": False, "max_steps": 2}
    train(chain, out, **plain)
    whole = read_curve(out)["loss/total"]
    shutil.rmtree(out / "step-00000002")
    state = out / "step-00000001" / "trainer.json"
    described = json.loads(state.read_text())
    for name in ("pretraining", "block_growth", "score_prompt"):
        del described["run"]["affects_loss"][name]
    state.write_text(json.dumps(described, indent=1, sort_keys=True))
    sums = state.with_name("checksums.json")
    sums.write_text(
        json.dumps(json.loads(sums.read_text()) | {state.name: hashlib.sha256(state.read_bytes()).hexdigest()})
    )
    assert train(chain, out, **plain)["loss/total"] == whole
    with pytest.raises(ValueError, match=r"was trained with pretraining = '', this run has 'ar:0.5'"):
        refuse_other_run(state.parent, {"affects_loss": {"pretraining": "ar:0.5"}})


def test_only_steps_that_denoise_are_released(whole, tmp_path):
    with pytest.raises(ValueError, match=r"step 3 was trained with ar, so the model is autoregressive"):
        open_checkpoint(whole / "step-00000003")
    assert open_checkpoint(whole / "step-00000004").step == 4
    assert convert(whole, tmp_path / "hf", Options(dtype="float32"))["largest_logit_difference"] == 0.0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["block_size"] == 8


@pytest.mark.parametrize("stated", [{"block_size": 32}, {"model_type": "qwen3"}], ids=["another", "plain-qwen3"])
def test_the_data_decide_the_block_size(chain, tmp_path, stated):
    student, run = tmp_path / "student", tmp_path / "run"
    shutil.copytree(chain.root / "student", student)
    config = json.loads((student / "config.json").read_text())
    del config["block_size"]
    (student / "config.json").write_text(json.dumps(config | stated))
    plain = {"strategy": "bd3lm", "pretraining": "", "block_growth": "", "score_prompt": False, "max_steps": 1}
    train(chain, run, student=str(student), **plain)
    assert open_model(run).model.config.block_size == 8
    convert(run, tmp_path / "hf", Options(dtype="float32"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["block_size"] == 8
