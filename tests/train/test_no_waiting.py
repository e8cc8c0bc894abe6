"""A step on tensors without values: nothing in it waits for the device, and nothing mixes devices."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tide.config import from_flat
from megatron_tide.diffusion import ATTENTION_LAYOUTS, DistillBatch, TeacherLayout, build_inputs, noise
from megatron_tide.diffusion.attention import TILE
from megatron_tide.files import read_json
from megatron_tide.hosting.backend import NoTeacher
from megatron_tide.hosting.layerwise import ForwardState, LayerwiseForward, TeacherInputs, make_flat_layers
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.models import backbone_a2d, experts, fresh_model, grouped
from megatron_tide.models.layer_specs import layer_specs_of
from megatron_tide.objectives import Counts, Strategy
from megatron_tide.train.build import make_loader
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.engine import share_cores
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.step import TrainContext, train_step
from tests.diffusion.samples import STUDENT_BLOCK, STUDENT_MASK, TEACHER_BLOCK, TEACHER_MASK, collate, make
from tests.objectives.test_strategy import CASES, built
from tests.support.launch import REPOSITORY
from tests.support.models import tiny_student_config, tiny_teacher_config
from tests.support.no_device import model_without_values, without_a_build, without_values

VOCAB = 1024
CHECKED = ["bd3lm", "tide-cross", "kl, one vocabulary", "tide-shared, two vocabularies", "tide-bridge"]
ATOMICS = ("index_add", "index_add_", "scatter_add", "scatter_reduce", "bincount", "histc")


def micro_batch(strategy: Strategy) -> DistillBatch:
    spans = [(1, 1), (2, 1), (1, 1), (1, 3), (2, 0), (1, 1), (3, 2)]
    batch = collate([make(5, (3, 6), spans), make(6, (2, 0), spans[::-1], ended=False), make(7, (9, 4), [(1, 1)])])
    drawn = noise(batch, seed=3, epoch=0, masking=strategy.masking, t=torch.tensor([0.5, 0.8, 0.9]))
    layout = TeacherLayout(ATTENTION_LAYOUTS["full"], TEACHER_BLOCK, TEACHER_MASK, strategy.compdemo)
    teacher = layout if strategy.needs_teacher else None
    return build_inputs(batch, drawn, student_block=STUDENT_BLOCK, student_mask_id=STUDENT_MASK, teacher=teacher)


def model_of(config: dict[str, Any], mode: FakeTensorMode, device: str, trained: bool) -> Any:
    model = fresh_model(config, 0).eval()
    return model_without_values(model if trained else model.bfloat16(), mode, device, trained)


def context_of(strategy: Strategy, mode: FakeTensorMode, device: str) -> TrainContext:
    trains = device == "cpu"
    student = model_of(tiny_student_config(vocab_size=VOCAB), mode, device, trains)
    backward = (lambda loss, scale_wrt_gas: loss.backward()) if trains else (lambda loss, scale_wrt_gas: None)
    engine = SimpleNamespace(module=student, backward=backward, step=lambda: None)
    world = SimpleNamespace(size=1, trace=SimpleNamespace(heartbeat=lambda: None))
    backend: Any = NoTeacher()
    if strategy.needs_teacher:
        backend = ReplicatedTeacher(model_of(tiny_teacher_config(vocab_size=VOCAB), mode, device, False), strategy)
    if strategy.rows is not None:  # columns of the vocabularies are placed once, and waiting is allowed there
        for side in (strategy.rows.vocabulary._student, strategy.rows.vocabulary._teacher):
            columns = side.columns(torch.empty(1, VOCAB))
            parts = [c if isinstance(c, slice) else without_values(c, mode, device) for c in columns]
            at = torch.device(device, 0) if device == "cuda" else torch.device(device)
            side._columns[at, VOCAB] = type(columns)(*parts)
    return TrainContext(
        engine=engine, backend=backend, strategy=strategy, world=world, clock=lambda part: nullcontext()
    )  # type: ignore[arg-type]


class Kinds(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def step(case: str, device: str) -> tuple[Any, set[str]]:
    """One step of two micro-batches on tensors without values; the operations in it."""
    strategy, mode = built(*CASES[case][:2]), FakeTensorMode()
    batch = micro_batch(strategy)
    if device == "cuda":
        batch = batch.padded(TILE)
    context = context_of(strategy, mode, device)
    inputs = batch._each(lambda tensor: without_values(tensor, mode, device))
    counts = Counts(maskable=9, chunks=5, pairs=3, next_tokens=0)
    with mode, Kinds() as kinds:
        return train_step(context, [inputs, inputs], counts, 0.3), kinds.names


@pytest.mark.parametrize("case", CHECKED)
def test_a_step_never_waits_for_the_device(case: str) -> None:
    found, _ = step(case, "cpu")
    assert found.losses["loss/total"].shape == ()


def test_the_stand_in_raises_where_a_device_would_be_waited_for() -> None:
    with FakeTensorMode():
        values = torch.ones(3)
        for waiting in (lambda: values.sum().item(), lambda: values.nonzero(), lambda: values[values > 0]):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waiting()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that checks its inputs, because compiling needs a device; a card with torch's own grouped kernel."""

    def flex(query: Any, key: Any, value: Any, *, block_mask: Any, scale: float, enable_gqa: bool) -> Any:
        tensors = [query, key, value, *(part for part in block_mask.as_tuple() if isinstance(part, torch.Tensor))]
        assert all(tensor.is_cuda for tensor in tensors)
        assert query.shape[2] % TILE == 0
        return query + value.mean() + key.mean()

    monkeypatch.setattr(backbone_a2d, "_flex", lambda device_type: flex)
    monkeypatch.setattr(experts, "compiled_sum", lambda: experts.weighted_sum)
    monkeypatch.setattr(grouped, "_capability", lambda device: 9)
    without_a_build(monkeypatch)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("case", CHECKED)
def test_a_step_mixes_no_devices(case: str) -> None:
    with torch.inference_mode():
        found, kinds = step(case, "cuda")
    assert found.losses["loss/total"].is_cuda
    assert not kinds & set(ATOMICS)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layerwise_teacher_never_waits_and_mixes_no_devices(device: str) -> None:
    """What every rank does with the layers of a sharded or offloaded teacher, or of a pipeline's stage."""
    strategy, mode = built(*CASES["tide-cross"][:2]), FakeTensorMode()
    layers = make_flat_layers(
        layer_specs_of(tiny_teacher_config(vocab_size=VOCAB)), torch.bfloat16, head_weight=None, score_targets=True
    )
    model_without_values(layers[0].specs.rotary, mode, device, False)
    for layer in layers:
        layer.flat = torch.nn.Parameter(without_values(layer.flat, mode, device), False)
        layer.exact = {name: without_values(tensor, mode, device) for name, tensor in layer.exact.items()}
    batch = micro_batch(strategy).padded(TILE)._each(lambda tensor: without_values(tensor, mode, device))
    states = [ForwardState(TeacherInputs.of(batch)) for _ in range(2)]
    with mode, torch.inference_mode():
        LayerwiseForward(layers)(states)
    for state in states:
        assert state.target_logprobs.shape == batch.teacher_targets.shape
        assert state.target_logprobs.device.type == device


def test_on_a_gpu_lengths_are_full_tiles(chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistillBatch, "pin_memory", lambda batch: batch)
    config = from_flat(chain.run(tmp_path / "run", strategy="tide-cross"))
    inputs = read_run_inputs(config, 1)
    plain, wide = (
        make_loader(config, inputs, DistContext(0, 1, torch.device(device), None))(0) for device in ("cpu", "cuda")
    )
    for mine, theirs in zip(plain, wide, strict=True):
        for short, long in ((mine.student, theirs.student), (mine.teacher, theirs.teacher)):
            assert short is not None
            assert long is not None
            assert long.input_ids.shape[1] == -(-short.input_ids.shape[1] // TILE) * TILE
            assert torch.equal(long.input_ids.flatten()[long.rows], short.input_ids.flatten()[short.rows])
            assert not long.attention.valid[:, short.input_ids.shape[1] :].any()


def test_what_is_offloaded_for_training_is_page_locked() -> None:
    found = {path.name: read_json(path)["zero_optimization"] for path in (REPOSITORY / "ds_configs").glob("zero*.json")}
    offloading = {name: zero["offload_optimizer"] for name, zero in found.items() if "offload_optimizer" in zero}
    assert "zero2_offload.json" in offloading
    assert all(offload["pin_memory"] for offload in offloading.values())


def test_cpu_adam_gets_the_cores_that_torchrun_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for said, local_ranks, threads in (("1", 4, [4]), (None, 1, [16]), ("1", 32, [1]), ("6", 4, [])):
        given.clear()
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if said:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        share_cores(local_ranks)
        assert given == threads
        assert os.environ["OMP_NUM_THREADS"] == str(*(threads or [said]))


@pytest.mark.usefixtures("card")
def test_a_tensor_left_on_the_host_is_noticed() -> None:
    strategy, mode = built(*CASES["tide-cross"][:2]), FakeTensorMode()
    context = context_of(strategy, mode, "cuda")
    inputs = micro_batch(strategy)._each(lambda tensor: without_values(tensor, mode, "cuda"))
    inputs = replace(inputs, student_targets=without_values(inputs.student_targets, mode, "cpu"))
    with mode, torch.inference_mode(), pytest.raises(Exception, match=r"(?i)device"):
        train_step(context, [inputs], Counts(maskable=9, chunks=5, pairs=3, next_tokens=0), 0.3)
