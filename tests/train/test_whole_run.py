"""What a run does beside its curve: launchers, held-out measurements, logs, full disks, recomputed activations."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tide.__main__ import main
from megatron_tide.config import from_flat
from megatron_tide.train import checkpoint
from megatron_tide.training_checkpoint import verify
from tests.support.launch import run_command
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve, train_and_tell

pytestmark = pytest.mark.ranks
BASE_FLAGS = {
    "log_every": 2,
}


def launched(*line, timeout=200):
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    "launcher",
    [
        (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"),
        (str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--module"),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_launchers(chain, tmp_path, launcher):
    flags = chain.flags(tmp_path / "run", strategy="calm", max_steps=2)
    finished = launched(*launcher, "megatron_tide.distill", *flags)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("step 2/2: finished") == 1
    assert (tmp_path / "run" / "step-00000002" / "checksums.json").exists()


def test_a_mistake_on_two_ranks_is_one_status_two(chain, tmp_path):
    line = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    finished = launched(
        *line, "megatron_tide.distill", *chain.flags(tmp_path / "run", global_batch_size=12, micro_batch_size=4)
    )
    assert finished.returncode != 0
    assert "error: --global-batch-size 12 is not a multiple of --micro-batch-size 4 x 2 ranks = 8" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_held_out_measurements_do_not_depend_on_the_ranks(chain, tmp_path):
    held_out = {"validation": str(chain.root / "data"), "eval_every": 2, "eval_samples": 7}
    measured = []
    for world in (1, 2):
        out = tmp_path / str(world)
        run_on_ranks(train_and_tell, world, chain.run(out, **BASE_FLAGS, **held_out), timeout=280)
        measured.append(read_curve(out)["validation/bits_per_byte"])
    assert len(measured[0]) == 2
    torch.testing.assert_close(torch.tensor(measured[1]), torch.tensor(measured[0]), rtol=0, atol=1e-5)


def test_logs_hold_what_a_reader_needs(chain, tmp_path):
    run_on_ranks(train_and_tell, 1, chain.run(tmp_path, **BASE_FLAGS, strategy="tide-bridge"), timeout=280)
    names = set(read_curve(tmp_path))
    assert {
        "loss/total",
        "loss/denoise",
        "loss/distill",
        "tidal/strength",
        "chunk/teacher_prob",
        "chunk/below_break_even",
        "distill/kl",
        "speed/tokens_per_s",
        "memory/host_peak_bytes",
        "time/teacher_share",
        "time/student_share",
        "train/lr",
        "train/grad_norm",
    } <= names
    assert any(name.startswith("denoise_by_timestep/") for name in names)
    assert list((tmp_path / "tensorboard").glob("events*"))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["strategy"]["strategy"] == "tide-bridge"
    assert run["bridge_fingerprint"]


def disk_full_at_second_save(settings):
    """Train on this rank with a disk that fills up while the second checkpoint is written; what was raised."""
    whole, calls = checkpoint.save_tensors, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) > 4:  # three files a checkpoint: the second one's second file
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(tensors, path, **options)

    checkpoint.save_tensors = full
    try:
        train_and_tell(settings)
    except OSError as error:
        return str(error)
    return "nothing was raised"


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(chain, tmp_path):
    settings = chain.run(tmp_path, **BASE_FLAGS, save_every=2, keep_last=1)
    for said in run_on_ranks(disk_full_at_second_save, 2, settings, timeout=200):
        assert "step-00000004" in said
        assert "No space left on device" in said
        assert "--resume auto" in said
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-00000002"]
    verify(tmp_path / "step-00000002")


def layer_calls(settings):
    """Times that the student's first MLP is entered in one optimizer step (a recomputation need not finish it)."""
    from megatron_tide.train import build
    from megatron_tide.train.distributed import destroy_distributed, init_distributed
    from megatron_tide.train.inputs import read_run_inputs
    from megatron_tide.train.step import global_counts, train_step

    config, world = from_flat(settings), init_distributed()
    context, loader = build.build(config, read_run_inputs(config, 1), world)
    calls = []
    context.engine.module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    microbatches = loader(0)
    train_step(context, microbatches, global_counts(microbatches, world, False)[0], 0.0)
    destroy_distributed()
    return len(calls)


def test_activation_checkpointing_recomputes_the_layers(chain, tmp_path):
    settings = chain.run(tmp_path, **BASE_FLAGS, strategy="calm")
    micro_batches = settings["global_batch_size"] // settings["micro_batch_size"]
    assert run_on_ranks(layer_calls, 1, settings) == [micro_batches]
    assert run_on_ranks(layer_calls, 1, {**settings, "activation_checkpointing": True}) == [2 * micro_batches]


def test_keeps_the_last_checkpoints_only(chain, tmp_path):
    run_on_ranks(train_and_tell, 1, chain.run(tmp_path, **BASE_FLAGS, save_every=1, keep_last=2), timeout=200)
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-00000003", "step-00000004"]


def test_runs_of_one_process_equal_runs_alone(chain, tmp_path):
    runs = [chain.flags(tmp_path / name, strategy=name, max_steps=2) for name in ("bd3lm", "tide-bridge")]
    joined = run_command(main, ["distill", *runs[0], "--then", "distill", *runs[1]], tmp_path)
    assert joined.status == 0, joined.printed[-3000:]
    run_on_ranks(train_and_tell, 1, chain.run(tmp_path / "alone", strategy="tide-bridge", max_steps=2))
    first, second = (tmp_path / name / "step-00000002" / "model.safetensors" for name in ("tide-bridge", "alone"))
    assert first.read_bytes() == second.read_bytes()
