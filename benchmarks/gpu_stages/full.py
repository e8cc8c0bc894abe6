"""What stages g, h and i train: models with random weights at full size, made on the device, and random samples.

Samples have S student and S teacher tokens, a quarter of them prompt; the rest are chunks of one or two tokens on
either side, half of them of one token on both. Useful FLOPs are those of what a step must compute (padding, the
copies that nothing depends on, and recomputation do not count), the same number for every way of computing them.

Shapes: M masked student rows, R scored teacher rows, P pairs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu_stages.bench import Bench
from megatron_tide.clock import Clock
from megatron_tide.config import DistillConfig, from_flat
from megatron_tide.data.batch import Batch, Tokens
from megatron_tide.diffusion import ATTENTION_LAYOUTS, DistillBatch, ModelInput, TeacherLayout, build_inputs, noise
from megatron_tide.diffusion.attention import TILE
from megatron_tide.diffusion.masking import Noise
from megatron_tide.fast import is_on
from megatron_tide.files import read_json
from megatron_tide.hosting.memory import Machine, ModelShape, RunShape, TeacherNeeds, estimate_memory
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.models import compile_layers, read_config
from megatron_tide.objectives import Strategy, build_strategy
from megatron_tide.train.build import compiles
from megatron_tide.train.distributed import DistContext, init_distributed
from megatron_tide.train.engine import build_engine
from megatron_tide.train.microbatches import Sent, Upload
from megatron_tide.train.step import TrainContext, global_counts, train_step

CONFIGS = Path(__file__).parents[2] / "megatron_tide/models/configs"
SIZES = {"student": "qwen3_0.6b.json", "teacher": "llada2_mini.json"}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2}
TINY: dict[str, dict[str, Any]] = {
    "student": {"vocab_size": 256, **_SHAPE},
    "teacher": {
        "vocab_size": 320,
        **_SHAPE,
        **_EXPERTS,
        "pad_token_id": 318,
        "eos_token_id": 318,
        "mask_token_id": 319,
    },
}
PROMPT, BATCH, SEED = 0.25, 64, 0
PATTERN = {"student": (1, 1, 1, 2), "teacher": (1, 1, 2, 1)}  # tokens of consecutive chunks


def config_of(side: str, tiny: bool, layers: int = 0) -> dict[str, Any]:
    """The shapes of a side; ``layers``: so many of its layers, 0 for all."""
    found = {**read_json(CONFIGS / SIZES[side]), **(TINY[side] if tiny else {})}
    return {**found, "num_hidden_layers": layers or found["num_hidden_layers"]}


def random_model(bench: Bench, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The module of a config with fresh weights, made on the device in its precision."""
    family, parsed = read_config(config)
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(bench.device):
            return family.module(parsed)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Item:
    """A micro-batch: clean samples, their noise, and the model inputs made of them."""

    batch: Batch
    drawn: Noise
    inputs: DistillBatch


class Subject:
    """One rank's training: engine of the student, teacher, strategies, and micro-batches of a step."""

    def __init__(
        self, bench: Bench, world: DistContext, teacher: Any, micro_batch: int, layers: int = 0, **flags: Any
    ) -> None:
        self.bench, self.world, self.teacher, self.micro_batch = bench, world, teacher, micro_batch
        self.batch = 2 * micro_batch if bench.tiny else BATCH
        self.length = 64 if bench.tiny else 512
        self.configs = {side: config_of(side, bench.tiny, layers) for side in SIZES}
        given = {
            "micro_batch_size": micro_batch,
            "global_batch_size": self.batch,
            "precision": "bf16",
            "max_steps": 100,
        }
        self.config: DistillConfig = from_flat({**given, **flags})
        model = random_model(bench, self.configs["student"], torch.float32).train()
        if compiles(self.config, world):
            compile_layers(model)
        self.engine = build_engine(model, self.config, world)
        self.shapes = {side: ModelShape(config) for side, config in self.configs.items()}
        self.upload = Upload(world.device)
        self._ahead: tuple[list[Item], Sent] | None = None

    def strategy(self, name: str, **flags: Any) -> Strategy:
        return build_strategy(replace(self.config.strategy, strategy=name, **flags), some_bridge(self.configs))

    def context(self, strategy: Strategy) -> TrainContext:
        backend, clock = ReplicatedTeacher(self.teacher, strategy), Clock(self.world.device)
        return TrainContext(engine=self.engine, backend=backend, strategy=strategy, world=self.world, clock=clock)

    def microbatches(self, strategy: Strategy, mixed: bool = False) -> list[Item]:
        """The micro-batches of one optimizer step; ``mixed``: of lengths from an eighth of S to S."""
        made = [self._item(strategy, start, mixed) for start in range(0, self.batch, self.micro_batch)]
        return [replace(item, inputs=self._as_loaded(item.inputs)) for item in made]

    def _as_loaded(self, inputs: DistillBatch) -> DistillBatch:
        """What the loader adds to inputs for a GPU."""
        if not self.bench.cuda:
            return inputs
        inputs = inputs.padded(TILE)
        return (inputs.with_tiles() if is_on("masks") else inputs).pin_memory()

    def _item(self, strategy: Strategy, first: int, mixed: bool) -> Item:
        lengths = torch.full((self.micro_batch,), self.length)
        if mixed:  # grouped by length, as the sampler does
            lengths = lengths // 8 * (1 + (first + torch.arange(self.micro_batch)) * 8 // self.batch)
        batch = random_batch(self.configs, lengths, first)
        drawn = noise(batch, seed=SEED, epoch=0, masking=strategy.masking)
        asked = TeacherLayout(
            ATTENTION_LAYOUTS[self.config.strategy.teacher_context],
            self.configs["teacher"]["block_size"],
            self.configs["teacher"]["mask_token_id"],
            strategy.compdemo,
        )
        block, mask_id = self.configs["student"]["block_size"], self.configs["student"]["vocab_size"] - 1
        made = build_inputs(batch, drawn, student_block=block, student_mask_id=mask_id, teacher=asked)
        return Item(batch, drawn, made)

    def step(self, context: TrainContext, microbatches: list[Item]) -> dict[str, float]:
        """One optimizer step as the loop takes it; -> its losses, read when it is done."""
        counts, _ = global_counts([item.inputs for item in microbatches], self.world, False)
        sums = train_step(context, self._received(microbatches), counts, 0.5)
        return {name: float(value) for name, value in sums.losses.items()}

    def _received(self, microbatches: list[Item]) -> list[DistillBatch]:
        """On the device; the next step's are sent before this one begins, as the loader's thread does."""
        made = [item.inputs for item in microbatches]
        if self._ahead is None or self._ahead[0] is not microbatches:
            self._ahead = microbatches, self.upload.send(made)
        sent, self._ahead = self._ahead[1], (microbatches, self.upload.send(made))
        return self.upload.receive(sent)

    def planned_bytes(self, strategy: Strategy) -> int:
        """The peak on the card that the planner expects."""
        needs = TeacherNeeds(
            target_logprobs=strategy.needs_target_logprobs,
            hidden=strategy.needs_hidden,
            compdemo=strategy.compdemo is not None,
            student_tokens=self.length,
            teacher_tokens=self.length,
        )
        run = RunShape(config=self.config, ranks=1, needs=needs, **self.shapes)
        machine = Machine(ranks=1, gpu_bytes=self.bench.limits.get("memory_bytes", 80 * 2**30), host_bytes=2**37)
        return estimate_memory(run, machine, {}).peak(host=False).bytes

    def close(self) -> None:
        """Give the engine's memory back: DeepSpeed's hooks would keep it."""
        self.engine.destroy()
        self.engine = None
        self.bench.clean()

    def useful_flops(self, microbatches: list[Item]) -> dict[str, float]:
        """Of a step: student forward and backward, teacher forward."""
        total = {"student": 0.0, "teacher": 0.0}
        for item in microbatches:
            total["student"] += 3 * forward_flops(self.shapes["student"], item.inputs.student)
            assert item.inputs.teacher is not None
            total["teacher"] += forward_flops(self.shapes["teacher"], item.inputs.teacher)
        return total


def forward_flops(shape: ModelShape, given: ModelInput) -> float:
    """Layers over the valid positions, attention over the pairs that see each other, the head over the rows."""
    valid = given.attention.valid
    seen = (given.attention.dense()[:, 0] & valid[:, :, None]).sum()
    attention = 4.0 * len(shape.widths) * shape.config.num_attention_heads * shape.config.head_dim * float(seen)
    head = 2.0 * len(given.rows) * shape.vocab * shape.hidden
    return 2.0 * shape.active_parameters * float(valid.sum()) + attention + head


def random_batch(configs: dict[str, dict[str, Any]], length: torch.Tensor, first: int) -> Batch:
    """Samples ``first`` and the ones after it, of ``length`` [B] tokens on both sides."""
    generator = torch.Generator().manual_seed(SEED + first)
    prompt = (length * PROMPT).long()
    chunk = {side: _chunks(PATTERN[side], length, prompt) for side in PATTERN}
    count = torch.minimum(*(ids.amax(1) for ids in chunk.values())) + 1
    sides = {}
    for side, ids in chunk.items():
        tokens = torch.randint(configs[side]["vocab_size"] - 3, ids.shape, generator=generator)
        ids = torch.where(ids < count[:, None], ids, -2).int()
        sides[side] = Tokens(ids=tokens, chunk=ids, length=length, prompt=prompt, content_end=length - 1)
    return Batch(keys=first + torch.arange(len(length)), chunks=count, **sides)


def _chunks(pattern: tuple[int, ...], length: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """int64 [B, S]: the chunk of each response token, -1 for prompt and padding."""
    cycle = torch.repeat_interleave(torch.arange(len(pattern)), torch.tensor(pattern))
    place = torch.arange(int(length.max())) - prompt[:, None]
    chunk = place // len(cycle) * len(pattern) + cycle[place % len(cycle)]
    return torch.where((place >= 0) & (place < (length - prompt)[:, None]), chunk, -1)


def some_bridge(configs: dict[str, dict[str, Any]]) -> Any:
    """Of a bridge what a strategy reads: three of five of the student's tokens are tokens of the teacher."""
    sizes = [configs[side]["vocab_size"] for side in ("student", "teacher")]
    generator, shared = torch.Generator().manual_seed(SEED), 3 * min(sizes) // 5
    student, teacher = (torch.randperm(size, generator=generator)[:shared] for size in sizes)
    return SimpleNamespace(shared=False, student_ids=student, teacher_ids=teacher)


@contextmanager
def training(bench: Bench) -> Iterator[DistContext]:
    """This process as the one rank of a run; on a GPU with NCCL."""
    world = init_distributed()
    gc.freeze()  # DeepSpeed collects garbage often: not among all that was imported
    bench.note(backend=torch.distributed.get_backend())
    yield world


def random_teacher(bench: Bench, layers: int = 0) -> Any:
    """The teacher in bf16, at full size 16.256B parameters."""
    config = config_of("teacher", bench.tiny, layers)
    return random_model(bench, config, torch.bfloat16).eval().requires_grad_(False)
