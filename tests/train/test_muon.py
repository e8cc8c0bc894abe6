"""Muon and AdamW on ZeRO's partitions, against torch's own on the whole model; kept and restored exactly."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_tide.config import from_flat
from megatron_tide.models import fresh_model
from megatron_tide.optimizer import hidden_matrices
from tests.support.models import tiny_student_config, tiny_teacher_config
from tests.support.ranks import run_on_ranks

STEPS = 4
FLAGS = {
    "optimizer": "muon",
    "lr": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "global_batch_size": 2,
    "micro_batch_size": 1,
}
RUNS = {
    "zero1": {"precision": "fp32"},
    "zero2": {"precision": "fp32"},
    "zero2_offload": {"precision": "fp32"},
    "zero1 bf16": {"precision": "bf16"},
}


TO_BF16 = torch.Tensor.bfloat16


def iterate_in_fp32(yes):
    """torch's Muon iterates in bf16, where a last bit of the gradient moves the update by a hundredth."""
    torch.Tensor.bfloat16 = torch.Tensor.clone if yes else TO_BF16


def model_of():
    """Layers with a router and stacked experts."""
    return fresh_model(tiny_teacher_config(), 0)


def loss_of(model, step, sample):
    generator = torch.Generator().manual_seed(10 * step + sample)
    ids = torch.randint(model.config.vocab_size, (1, 12), generator=generator)
    return nn.functional.cross_entropy(model(ids).logits[0].float(), ids[0]) / 2


def plain_loop():
    """The weights that one process and torch's two optimizers end with."""
    config, model = from_flat(FLAGS).train, model_of()
    matrices = hidden_matrices(model)
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    # Stacked experts are seen as one parameter each, on the same memory.
    views = {p: [nn.Parameter(m) for m in p.data.view(-1, *p.shape[-2:])] for p in matrices.values()}
    muon = torch.optim.Muon(
        [view for each in views.values() for view in each],
        lr=config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
    )
    decayed = {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay}
    plain = {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, plain], lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    for step in range(STEPS):
        model.zero_grad()
        for sample in range(2):
            loss_of(model, step, sample).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for parameter, each in views.items():
            for view, gradient in zip(each, parameter.grad.view(-1, *parameter.shape[-2:])):
                view.grad = gradient
        muon.step()
        adamw.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def engine_of(run, world):
    from megatron_tide.train.engine import build_engine

    config = from_flat({**FLAGS, **RUNS[run], "deepspeed": f"ds_configs/{run.split()[0]}.json"})
    iterate_in_fp32(False)  # a model in bf16 is cast by the same method
    engine = build_engine(model_of(), config, world)
    iterate_in_fp32(True)
    return engine


def steps_of(engine, world, steps):
    for step in steps:
        for sample in range(world.rank, 2, world.size):
            engine.backward(loss_of(engine.module, step, sample) * world.size, scale_wrt_gas=False)
            engine.step()


def state_of(engine):
    from megatron_tide.train.engine import full_master_weight, full_moment, moments, trained_parameters

    state = {name: full_master_weight(p).clone() for name, p in trained_parameters(engine)}
    parameters = dict(trained_parameters(engine))
    for moment, names in moments(engine).items():
        state |= {f"{moment}/{name}": full_moment(parameters[name], moment).clone() for name in sorted(names)}
    return state


def train_all(folder, from_world):
    """Train each of RUNS, and again from the middle of ``from_world`` ranks' checkpoints; saves all final states."""
    from megatron_tide.train import checkpoint
    from megatron_tide.train.distributed import destroy_distributed, init_distributed
    from megatron_tide.training_checkpoint import TrainState

    world = init_distributed()
    half, states = TrainState(step=STEPS // 2, total_steps=STEPS), {}
    try:
        for run in RUNS:
            engine = engine_of(run, world)
            steps_of(engine, world, range(half.step))
            checkpoint.save(folder / f"{world.size}-{run}", engine, half, {}, world, 1)
            steps_of(engine, world, range(half.step, STEPS))
            states[run] = state_of(engine)
        for run in RUNS:
            engine = engine_of(run, world)
            saved = checkpoint.checkpoint_folder(folder / f"{from_world}-{run}", half.step)
            assert checkpoint.restore(saved, engine) == half
            steps_of(engine, world, range(half.step, STEPS))
            states[f"{run} resumed"] = state_of(engine)
        for run, state in states.items():
            save_file(state, folder / f"{world.size}-{world.rank}-{run}")
    finally:
        destroy_distributed()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.ranks
def test_the_same_as_torch_on_any_ranks_stage_and_after_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", TO_BF16)  # for it to be restored
    iterate_in_fp32(True)
    expected = plain_loop()
    for world in (1, 2):
        run_on_ranks(train_all, world, tmp_path, 1, timeout=280)
    for run, settings in RUNS.items():
        one, resumed = (load_file(tmp_path / f"1-0-{name}") for name in (run, f"{run} resumed"))
        # DeepSpeed's CPU Adam multiplies its bias corrections up step by step, and takes powers where it resumes.
        assert same(one, resumed) or ("offload" in run and close(resumed, one, run)), run
        for name in (run, f"{run} resumed"):
            two, other = (load_file(tmp_path / f"2-{rank}-{name}") for rank in (0, 1))
            assert same(two, other), name
            close(two, one, name)
        if settings["precision"] == "fp32":
            close({name: one[name] for name in expected}, expected, run)


def close(found, expected, what):
    """Within the bounds of AdamW's tests (test_topology.py)."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{what}: {n}: {m}")
    return True


def test_which_weights_are_hidden_matrices():
    student = hidden_matrices(fresh_model(tiny_student_config(), 0))
    assert {name.split(".", 3)[3] for name in student} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    teacher = hidden_matrices(model_of())
    assert any(tensor.ndim == 3 for tensor in teacher.values())
    assert not any(
        "word_embeddings" in name or "lm_head" in name or name.endswith("mlp.gate.weight") for name in teacher
    )
