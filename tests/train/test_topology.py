"""Any topology gives the same curve: ranks, micro-batches, ZeRO stages, offload."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide.release import Options, convert
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve, train_and_tell

pytestmark = pytest.mark.ranks
STEPS = 20


def curve_of(chain, out, world, **flags):
    values = run_on_ranks(train_and_tell, world, chain.run(out, **{**BASE_FLAGS, **flags}), timeout=280)
    assert all(value == values[0] for value in values)
    nats = values[0]["denoise/nats_per_masked_token"]
    assert len(nats) < STEPS or sum(nats[-5:]) < sum(nats[:5]), "it should learn"
    return values[0]["loss/total"]


BASE_FLAGS = {
    "max_steps": STEPS,
    "temperature": 4.0,
    "strategy": "tide-bridge",
}


@pytest.fixture(scope="module")
def untouched(chain, tmp_path_factory):
    """The reference: one rank, two micro-batches a step, ZeRO 1."""
    out = tmp_path_factory.mktemp("untouched")
    return curve_of(chain, out, 1), load_file(out / f"step-{STEPS:08d}" / "model.safetensors")


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {}),
        (1, {"micro_batch_size": 8}),
        (1, {"micro_batch_size": 1}),
        (2, {"micro_batch_size": 2, "deepspeed": "ds_configs/zero2.json"}),
        (2, {"deepspeed": "ds_configs/zero2_offload.json"}),
        (1, {"activation_checkpointing": True}),
    ],
    ids=["2-ranks", "micro-8", "micro-1", "2-ranks-zero2-accumulating", "2-ranks-offload", "checkpointing"],
)
def test_same_curve(chain, untouched, tmp_path, world, flags):
    losses, weights = untouched
    curve = curve_of(chain, tmp_path, world, **flags)
    assert len(curve) == STEPS
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(losses), rtol=0, atol=1e-5)
    for name, tensor in load_file(tmp_path / f"step-{STEPS:08d}" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)


def test_any_checkpoint_becomes_a_release(chain, tmp_path):
    """Of any ZeRO stage and number of ranks, with optimizer offload or without: the same weights, parity and all."""
    releases = {}
    for name, world, settings in (("one", 1, "zero1"), ("two", 2, "zero2"), ("offload", 2, "zero2_offload")):
        run, out = tmp_path / name, tmp_path / f"{name}-hf"
        curve_of(chain, run, world, max_steps=2, strategy="bd3lm", deepspeed=f"ds_configs/{settings}.json")
        parity = convert(run, out, Options(dtype="float32"))
        assert parity["largest_logit_difference"] == 0.0
        releases[name] = load_file(out / "model.safetensors")
    for name, tensors in releases.items():
        assert tensors.keys() == releases["one"].keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, releases["one"][key], rtol=1e-3, atol=2e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("strategy", ["bd3lm", "tide-cross", "tide-shared", "kl"])
def test_every_kind_of_strategy_on_two_ranks(chain, tmp_path, strategy):
    flags = {"strategy": strategy, "max_steps": 3, "masking": "synchronous"}
    one = curve_of(chain, tmp_path / "one", 1, **flags)
    two = curve_of(chain, tmp_path / "two", 2, **flags)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=0, atol=1e-5)


def test_bf16_follows_fp32_within_its_noise(chain, untouched, tmp_path):
    curve = curve_of(chain, tmp_path, 2, precision="bf16", teacher_dtype="bf16")
    # bf16 keeps 8 bits: a loss of about 6 is off by a few hundredths, and Adam's path drifts with it.
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(untouched[0]), rtol=0.05, atol=0)


def test_noise_of_blocks_on_two_ranks(chain, tmp_path):
    """Timesteps per block, stratified over the global batch: a sample's place in it does not depend on the topology."""
    sampling = {"timesteps": "block", "timestep_sampling": "stratified", "mask_count": "exact"}
    flags = {"max_steps": 3, "compdemo_split": "exact", "tidal_midrange": True, **sampling}
    one = curve_of(chain, tmp_path / "one", 1, **flags)
    two = curve_of(chain, tmp_path / "two", 2, micro_batch_size=2, **flags)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=0, atol=1e-5)
    curves = [read_curve(tmp_path / name) for name in ("one", "two")]
    for name in ("tidal/strength", "chunk/active_share", "denoise/nats_per_masked_token"):
        assert curves[1][name] == pytest.approx(curves[0][name], rel=1e-5), name
