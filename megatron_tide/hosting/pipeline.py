"""The teacher in a pipeline: DeepSpeed's PipelineModule, one run of consecutive units per rank.

The ranks of a pipeline are also data-parallel members, each with a window of its own. All their micro-batches flow
through together:

    every member's questions -> first stage -> ... -> last stage -> every member's numbers

Only questions (token ids, row indices) travel in, hidden states between neighbours, and the few numbers an objective
needs travel back. Shapes are exchanged on the host first, so that no rank waits for its device to learn a size.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tide.clock import Clock
from megatron_tide.diffusion import DistillBatch
from megatron_tide.hosting.flat_layers import FlatLayer
from megatron_tide.hosting.layerwise import make_flat_layers
from megatron_tide.hosting.outputs import replicated_output, teacher_outputs
from megatron_tide.hosting.packing import Sizes, pack, pack_outputs, unpack, unpack_outputs
from megatron_tide.hosting.state import ForwardState, TeacherInputs
from megatron_tide.models.layer_specs import LayerSpecs
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy, TeacherOutputs


class PipelineStage(nn.Module):
    """The units of one rank: (packed question), or (hidden, packed question), in; (hidden, packed question) out.

    The last stage keeps its passages in ``answered`` and gives a zero: answers differ in size, and DeepSpeed adds
    outputs up. ``coming`` holds the sizes of the micro-batches that will arrive, in order.
    """

    def __init__(
        self, flat_layers: Sequence[FlatLayer], specs: LayerSpecs, clock: Clock, first: bool, last: bool
    ) -> None:
        super().__init__()
        self.flat_layers = nn.ModuleList(flat_layers)
        self._sections = [specs]  # in a list: not a submodule
        self.first, self.last = first, last
        self.coming: deque[Sizes] = deque()
        self.answered: list[ForwardState] = []
        self.clock = clock

    def forward(self, inputs: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, Tensor] | Tensor:
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        packed = tensors[-1]
        with self.clock("busy"):
            state = ForwardState(unpack(packed, self.coming.popleft()))
            if not self.first:
                positions = state.inputs.input.position_ids
                state.start(tensors[0], *self._sections[0].rotations(tensors[0], positions))
            for flat_layer in self.flat_layers:
                flat_layer([state])
        if self.last:
            self.answered.append(state)
            return packed.new_zeros(())
        return state.hidden, packed


class PipelineTeacher:
    """A frozen teacher over ``settings["pipeline"]["stages"]`` ranks, as often as they fit into the world."""

    def __init__(
        self,
        specs: LayerSpecs,
        source: ShardedFolder,
        dtype: torch.dtype,
        strategy: Strategy,
        settings: dict[str, Any],
        device: torch.device,
        print_rank0: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.strategy, self.dtype, self.device = strategy, dtype, device
        self.hidden_size = specs.config.hidden_size
        self.output = replicated_output(specs, source, dtype, device) if strategy.needs_hidden else None
        stages = settings["pipeline"]["stages"]
        flat_layers = make_flat_layers(specs, dtype, output=self.output, gold=strategy.needs_target_logprobs)
        self.members, self.group, self.host_group = _join_pipeline(stages)
        bounds = balanced(flat_layers, stages)
        place = self.members.index(dist.get_rank())
        mine = flat_layers[bounds[place] : bounds[place + 1]]
        for number, flat_layer in enumerate(mine, 1):
            print_rank0(
                f"teacher: loading {flat_layer.title} ({number} of {len(mine)}, {flat_layer.flat_bytes / 1e9:.2f} GB)"
            )
            flat_layer.fill(source, device)
        self.clock = Clock(device)
        self.engine = _engine(settings, mine, specs, self.clock, place)
        self.stage: PipelineStage = self.engine.module.forward_funcs[0]

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        """One answer a micro-batch; a collective of the pipeline's members, whatever their windows hold."""
        with self.clock("sweep"):
            inputs = [TeacherInputs.of(batch) for batch in microbatches]
            every_sizes: list[list[Sizes]] = [[] for _ in self.members]
            dist.all_gather_object(every_sizes, [Sizes.of(inputs) for inputs in inputs], group=self.host_group)
            arrivals = self._collect(inputs, every_sizes)
            self.stage.coming.extend(sizes for member in every_sizes for sizes in member)
            self._run(arrivals, sum(map(len, every_sizes)))
            states = self._give_back(inputs, every_sizes)
        return teacher_outputs(states, self.strategy, self.output)

    def metrics(self) -> dict[str, float]:
        """The bubble: the share of its sweeps' time, since the last call, in which this stage had nothing to do."""
        seconds = self.clock.read()
        return {"teacher/pipeline_bubble": 1.0 - seconds["busy"] / seconds["sweep"]} if seconds else {}

    def _collect(self, inputs: Sequence[TeacherInputs], every_sizes: list[list[Sizes]]) -> list[Tensor]:
        """Every member's packed questions, on the first stage; nothing on the others."""
        totals = [sum(sizes.packed for sizes in member) for member in every_sizes]
        mine = torch.zeros(max(totals), dtype=torch.int64, device=self.device)
        packed = [pack(inputs) for inputs in inputs]
        if packed:
            mine[: totals[self.members.index(dist.get_rank())]] = torch.cat(packed)
        parcels = [torch.empty_like(mine) for _ in self.members] if self.stage.first else None
        dist.gather(mine, parcels, dst=self.members[0], group=self.group)
        return [
            part
            for parcel, member in zip(parcels or [], every_sizes)
            for part in parcel[: sum(sizes.packed for sizes in member)].split([sizes.packed for sizes in member])
        ]

    def _run(self, arrivals: list[Tensor], count: int) -> None:
        self.engine.total_loss = None  # DeepSpeed never resets it
        # (inputs, labels): only the first stage looks at inputs, and nobody at labels.
        batches: list[Any] = [((part,), ()) for part in arrivals] or [((), ())] * count
        # Also for none: it has a barrier of all pipelines in it.
        self.engine.eval_batch(iter(batches), compute_loss=False, reduce_output=None, num_micro_batches=count)

    def _give_back(self, inputs: Sequence[TeacherInputs], every_sizes: list[list[Sizes]]) -> list[ForwardState]:
        """This rank's passages, answered: the last stage sends every member its own numbers."""
        hidden = self.hidden_size if self.strategy.needs_hidden else 0
        lengths = [sum(sizes.output_bytes(hidden, self.dtype) for sizes in member) for member in every_sizes]
        mine = torch.empty(max(lengths), dtype=torch.uint8, device=self.device)
        parcels = None
        if self.stage.last:
            answered, parcels = iter(self.stage.answered), []
            for member in every_sizes:
                filled = pack_outputs([next(answered) for _ in member], hidden > 0, self.device)
                parcels.append(nn.functional.pad(filled, (0, len(mine) - len(filled))))
            self.stage.answered = []
        dist.scatter(mine, parcels, src=self.members[-1], group=self.group)
        states = [ForwardState(inputs) for inputs in inputs]
        unpack_outputs(mine, states, hidden, self.dtype)
        return states


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


def balanced(flat_layers: Sequence[FlatLayer], stages: int) -> list[int]:
    """Where each stage begins, and the end: the heaviest stage is as light as it can be, by bytes.

    DeepSpeed's own ``partition_balanced`` does not always find that. Where several do, the others are even, too.
    """
    if stages > len(flat_layers):
        raise ValueError(
            f"--teacher-deepspeed: pipeline.stages is {stages}, and this teacher has {len(flat_layers)} parts "
            f"(embedding, layers, head): take at most {len(flat_layers)} stages"
        )
    upto = [0, *itertools.accumulate(flat_layer.flat_bytes for flat_layer in flat_layers)]

    @functools.cache
    def best(count: int, parts: int) -> tuple[int, int, list[int]]:
        """The first ``count`` units in ``parts`` stages: bytes of the heaviest, the sum of squares, the bounds."""
        if parts == 1:
            return upto[count], upto[count] ** 2, [0, count]
        found = []
        for cut in range(parts - 1, count):
            heaviest, squares, bounds = best(cut, parts - 1)
            last = upto[count] - upto[cut]
            found.append((max(heaviest, last), squares + last**2, [*bounds, count]))
        return min(found)

    return best(len(flat_layers), stages)[2]


def _engine(
    settings: dict[str, Any], flat_layers: Sequence[FlatLayer], specs: LayerSpecs, clock: Clock, place: int
) -> Any:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology
    from deepspeed.utils import groups

    stages = settings["pipeline"]["stages"]
    # Each rank builds the one that is its own, so all may be given this rank's units.
    spec = LayerSpec(PipelineStage, flat_layers, specs, clock, place == 0, place == stages - 1)
    topology = ProcessTopology(axes=["data", "pipe"], dims=[dist.get_world_size() // stages, stages])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its whole topology
        module = PipelineModule([spec] * stages, topology=topology, partition_method="uniform", dynamic_shape=True)
    engine, *_ = deepspeed.initialize(model=module, config={**settings, "train_micro_batch_size_per_gpu": 1})
    groups.mpu = None  # left behind, it would make the student's engine believe in pipeline groups
    return engine
