"""The teacher in a pipeline: DeepSpeed's PipelineModule, a run of consecutive layers on each rank.

The ranks of a pipeline ("members") are also data-parallel ranks, each with its own micro-batches. All of them flow
through together:

    inputs of every member -> first stage -> ... -> last stage -> outputs of every member

Only inputs (token ids, row indices) travel in, hidden states between neighbours, and the few numbers an objective
needs travel back, all packed into flat tensors. Their sizes are exchanged on the host first, so that no rank waits for
its device to learn a size.

Shapes: N sequences, L positions, R target positions, P one-to-one chunks ("pairs"), H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tide.clock import Clock
from megatron_tide.diffusion import BlockDiffusionMask, DistillBatch, ModelInput
from megatron_tide.hosting.layerwise import FlatLayer, ForwardState, LayerwiseTeacher, TeacherInputs, outputs_of
from megatron_tide.models.layer_specs import LayerSpecs
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import TeacherOutputs


@dataclass(frozen=True)
class Sizes:
    """The sizes of one micro-batch's inputs and outputs."""

    sequences: int
    length: int
    rows: int
    pairs: int

    @classmethod
    def of(cls, inputs: TeacherInputs) -> Sizes:
        sequences, length = inputs.input.input_ids.shape
        return cls(sequences, length, len(inputs.targets), len(inputs.pair_index))

    @property
    def parts(self) -> list[int]:
        """Numbers in each part of packed inputs: ids, positions, attention (3), rows, targets, pairs."""
        return [self.sequences * self.length] * 5 + [self.rows] * 2 + [self.pairs]

    @property
    def packed(self) -> int:
        """Numbers in packed inputs."""
        return sum(self.parts)

    def output_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of packed outputs with ``hidden`` numbers of ``dtype`` per pair."""
        return 4 * self.rows + self.pairs * hidden * dtype.itemsize


def pack(inputs: TeacherInputs) -> Tensor:
    """int64 [Sizes.packed]."""
    given, attention = inputs.input, inputs.input.attention
    attends = attention.block, attention.noised, attention.valid
    parts = given.input_ids, given.position_ids, *attends, given.rows, inputs.targets, inputs.pair_index
    return torch.cat([part.flatten().to(torch.int64) for part in parts])


def unpack(packed: Tensor, sizes: Sizes) -> TeacherInputs:
    """The inputs that :func:`pack` packed."""
    ids, positions, block, noised, valid, rows, targets, pair_index = packed.split(sizes.parts)
    shape = sizes.sequences, sizes.length
    attention = BlockDiffusionMask(block.view(shape).int(), noised.view(shape).bool(), valid.view(shape).bool())
    return TeacherInputs(ModelInput(ids.view(shape), positions.view(shape), attention, rows), targets, pair_index)


def pack_outputs(states: Sequence[ForwardState], with_hidden: bool, device: torch.device) -> Tensor:
    """uint8: of each micro-batch its target log-probs (fp32) and, ``with_hidden``, the hidden states of its pairs."""
    parts = [torch.empty(0, dtype=torch.uint8, device=device)]
    for state in states:
        parts.append(state.target_logprobs.float().view(torch.uint8))
        if with_hidden:
            parts.append(state.pair_hidden.flatten().view(torch.uint8))
    return torch.cat(parts)


def unpack_outputs(packed: Tensor, states: Sequence[ForwardState], hidden: int, dtype: torch.dtype) -> None:
    """Set in ``states`` what :func:`pack_outputs` packed for them; ``hidden``: numbers per pair, 0 without."""
    start = 0

    def take(size: int, kind: torch.dtype) -> Tensor:
        nonlocal start
        piece = packed[start : start + size * kind.itemsize].clone()  # at the start of memory: aligned for its type
        start += len(piece)
        return piece.view(kind)

    for state in states:
        state.target_logprobs = take(len(state.inputs.targets), torch.float32)
        state.pair_hidden = take(len(state.inputs.pair_index) * hidden, dtype).view(-1, max(hidden, 1))


class PipelineStage(nn.Module):
    """The layers of one rank: (packed inputs), or (hidden, packed inputs), in; (hidden, packed inputs) out.

    The last stage keeps the states in ``finished`` and returns a zero: DeepSpeed adds outputs up, and sizes differ.
    ``expected`` holds the sizes of the micro-batches that will arrive, in order.
    """

    def __init__(self, layers: Sequence[FlatLayer], specs: LayerSpecs, clock: Clock, first: bool, last: bool) -> None:
        super().__init__()
        self.flat_layers = nn.ModuleList(layers)
        self._specs = [specs]  # in a list: not a submodule
        self.first, self.last = first, last
        self.expected: deque[Sizes] = deque()
        self.finished: list[ForwardState] = []
        self.clock = clock

    def forward(self, arrived: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, Tensor] | Tensor:
        tensors = arrived if isinstance(arrived, tuple) else (arrived,)
        packed = tensors[-1]
        with self.clock("busy"):
            state = ForwardState(unpack(packed, self.expected.popleft()))
            if not self.first:
                positions = state.inputs.input.position_ids
                state.start(tensors[0], *self._specs[0].rotations(tensors[0], positions))
            for layer in self.flat_layers:
                layer([state])
        if self.last:
            self.finished.append(state)
            return packed.new_zeros(())
        return state.hidden, packed


class PipelineTeacher(LayerwiseTeacher):
    """A frozen teacher over ``settings["pipeline"]["stages"]`` ranks; more ranks form several such pipelines."""

    def _load(self, source: ShardedFolder, settings: dict[str, Any]) -> None:
        stages = settings["pipeline"]["stages"]
        self.members, self.group, self.host_group = _join_pipeline(stages)
        self.place = self.members.index(dist.get_rank())
        bounds = balanced(self.flat_layers, stages)
        self.flat_layers = self.flat_layers[bounds[self.place] : bounds[self.place + 1]]
        for layer in self._announce(self.flat_layers):
            layer.fill(source, self.ranks.device)
        self.clock = Clock(self.ranks.device)
        self.stage = PipelineStage(self.flat_layers, self.specs, self.clock, self.place == 0, self.place == stages - 1)
        self.engine = _engine(settings, self.stage)
        # Numbers per pair that travel back.
        self.hidden_size = self.specs.config.hidden_size if self.strategy.needs_hidden else 0

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        with self.clock("sweep"):
            inputs = [TeacherInputs.of(batch) for batch in microbatches]
            sizes: list[list[Sizes]] = [[] for _ in self.members]
            dist.all_gather_object(sizes, [Sizes.of(given) for given in inputs], group=self.host_group)
            arrivals = self._gather_inputs(inputs, sizes)
            self.stage.expected.extend(itertools.chain(*sizes))
            self._run(arrivals, sum(map(len, sizes)))
            states = self._scatter_outputs(inputs, sizes)
        return outputs_of(states, self.strategy, self.head_weight)

    def metrics(self) -> dict[str, float]:
        """The bubble: the share of the sweep time in which this stage was idle."""
        seconds = self.clock.read()
        return {"teacher/pipeline_bubble": 1.0 - seconds["busy"] / seconds["sweep"]} if seconds else {}

    def _gather_inputs(self, inputs: Sequence[TeacherInputs], sizes: list[list[Sizes]]) -> list[Tensor]:
        """The packed inputs of every member's micro-batches, on the first stage; [] on the others."""
        lengths = [[item.packed for item in member] for member in sizes]
        mine = torch.zeros(max(map(sum, lengths)), dtype=torch.int64, device=self.ranks.device)
        if inputs:
            mine[: sum(lengths[self.place])] = torch.cat([pack(given) for given in inputs])
        gathered = [torch.empty_like(mine) for _ in self.members] if self.stage.first else None
        dist.gather(mine, gathered, dst=self.members[0], group=self.group)
        return [part for packed, parts in zip(gathered or [], lengths) for part in packed[: sum(parts)].split(parts)]

    def _run(self, arrivals: list[Tensor], count: int) -> None:
        self.engine.total_loss = None  # DeepSpeed never resets it
        # (inputs, labels): only the first stage reads inputs, and none reads labels.
        batches: list[Any] = [((part,), ()) for part in arrivals] or [((), ())] * count
        # Also for count 0: it has a barrier of all pipelines in it.
        self.engine.eval_batch(iter(batches), compute_loss=False, reduce_output=None, num_micro_batches=count)

    def _scatter_outputs(self, inputs: Sequence[TeacherInputs], sizes: list[list[Sizes]]) -> list[ForwardState]:
        """This rank's micro-batches, finished: the last stage sends every member its own outputs."""
        lengths = [sum(item.output_bytes(self.hidden_size, self.dtype) for item in member) for member in sizes]
        mine = torch.empty(max(lengths), dtype=torch.uint8, device=self.ranks.device)
        scattered = None
        if self.stage.last:
            finished, scattered = iter(self.stage.finished), []
            for member in sizes:
                packed = pack_outputs([next(finished) for _ in member], self.hidden_size > 0, self.ranks.device)
                scattered.append(nn.functional.pad(packed, (0, len(mine) - len(packed))))
            self.stage.finished = []
        dist.scatter(mine, scattered, src=self.members[-1], group=self.group)
        states = [ForwardState(given) for given in inputs]
        unpack_outputs(mine, states, self.hidden_size, self.dtype)
        return states


def balanced(flat_layers: Sequence[FlatLayer], stages: int) -> list[int]:
    """Where each stage begins, and the end: the heaviest stage is as light as possible, by bytes.

    DeepSpeed's own ``partition_balanced`` does not always find that. Among equals, the one with even stages.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > len(flat_layers):
        raise ValueError(
            f"--teacher-hosting: a pipeline of {stages} stages, but this teacher has {len(flat_layers)} parts "
            f"(embedding, layers, head); use at most {len(flat_layers)} stages"
        )
    upto = [0, *itertools.accumulate(layer.flat_bytes for layer in flat_layers)]

    @functools.cache
    def best(count: int, parts: int) -> tuple[int, int, list[int]]:
        """The first ``count`` layers in ``parts`` stages: bytes of the heaviest, sum of squares, bounds."""
        if parts == 1:
            return upto[count], upto[count] ** 2, [0, count]
        found = []
        for cut in range(parts - 1, count):
            heaviest, squares, bounds = best(cut, parts - 1)
            last = upto[count] - upto[cut]
            found.append((max(heaviest, last), squares + last**2, [*bounds, count]))
        return min(found)

    return best(len(flat_layers), stages)[2]


def _join_pipeline(stages: int) -> tuple[list[int], Any, Any]:
    """The ranks of this rank's pipeline, neighbours by number, with a device group and a host group of them."""
    found: tuple[list[int], Any, Any] | None = None
    for start in range(0, dist.get_world_size(), stages):
        members = list(range(start, start + stages))
        groups = dist.new_group(members), dist.new_group(members, backend="gloo")
        if dist.get_rank() in members:
            found = members, *groups
    assert found is not None
    return found


def _engine(settings: dict[str, Any], stage: PipelineStage) -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology
    from deepspeed.utils import groups

    stages = settings["pipeline"]["stages"]
    topology = ProcessTopology(axes=["data", "pipe"], dims=[dist.get_world_size() // stages, stages])
    # DeepSpeed builds on each rank the one stage that is its own, so every place may hold this rank's.
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its complete topology
        module = PipelineModule([stage] * stages, topology=topology, partition_method="uniform", dynamic_shape=True)
    engine, *_ = deepspeed.initialize(model=module, config={**settings, "train_micro_batch_size_per_gpu": 1})
    groups.mpu = None  # left behind, it would make the student's engine believe in pipeline groups
    return engine
