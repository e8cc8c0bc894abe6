"""The student's optimizer: its DeepSpeed settings, parameter groups, state, and memory.

To add an optimizer, write a class like these and its line in ``choices.OPTIMIZERS``. A parameter group holds, beside
what the optimizer reads: ``names`` of its parameters, ``moments`` that they have (fp32 tensors of a parameter's shape;
checkpoints store them by name), and ``initial_lr``, its peak learning rate.

Muon is torch's (``torch.optim.Muon``: Jordan et al. 2024, in bf16), on whole matrices. DeepSpeed 0.19 has one as well,
but in ZeRO 1 and 2 it clips the orthogonalised update where the gradient is meant: with clipping every step, AdamW's
included, is divided by a norm that grows with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tide.config import TrainConfig
from megatron_tide.fast import is_on

FP32 = 4  # bytes
MUON_TEMPORARIES = 20  # bytes per number of the matrix at work: the update in fp32 and bf16, products, what torch keeps


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained parameters: all, those in hidden matrices, and those of the largest hidden weight."""

    parameters: int
    matrices: int
    largest_matrix: int


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the layers that are matrices, by name: not embedding, head, router, norms and biases.

    Stacked experts [E, out, in] are E matrices.
    """
    stacks = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        f"{path}.{inner}.{name}": parameter
        for path, stack in stacks
        for inner, module in stack.named_modules()
        if not getattr(module, "is_router", False)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }


class AdamW:
    """AdamW on fp32 master weights; weight decay on matrices only."""

    moments = ("exp_avg", "exp_avg_sq")

    def state_bytes(self, sizes: ParameterCounts) -> int:
        """Bytes of state, summed over all ranks."""
        return FP32 * len(self.moments) * sizes.parameters

    def update_bytes(self, sizes: ParameterCounts, ranks: int, *, has_gpus: bool, offloads: bool) -> float:
        """Bytes of temporaries of each rank's update: torch's AdamW has some, fused or DeepSpeed's on the CPU none."""
        if offloads or (has_gpus and is_on("adam")):
            return 0
        return (FP32 if has_gpus else 2 * FP32) * sizes.parameters / ranks

    def deepspeed(self, train: TrainConfig, offloads: bool, fused: bool) -> dict[str, Any]:
        """Keys of the DeepSpeed configuration; ``fused``: torch's AdamW as one kernel."""
        # torch's AdamW needs no compiled op; with offload, DeepSpeed's CPU Adam is the faster one.
        betas = [train.beta1, train.beta2]
        params = {"lr": train.lr, "betas": betas, "eps": train.adam_eps, "torch_adam": not offloads}
        if fused and not offloads:
            params["fused"] = True
        return {"optimizer": {"type": "AdamW", "params": params}}

    def client(self, train: TrainConfig, offloads: bool, fused: bool) -> Callable[[Any], torch.optim.Optimizer] | None:
        """What makes an optimizer of parameter groups; None: DeepSpeed makes it by its configuration."""
        return None

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        """The trained parameters of ``model`` as optimizer groups, none of them empty."""
        return self._groups({name: p for name, p in model.named_parameters() if p.requires_grad}, train)

    def _groups(self, trained: dict[str, nn.Parameter], train: TrainConfig) -> list[dict[str, Any]]:
        parts = (
            ([name for name, p in trained.items() if p.ndim > 1], train.weight_decay),
            ([name for name, p in trained.items() if p.ndim <= 1], 0.0),
        )
        return [_group(trained, names, self.moments, train.lr, decay) for names, decay in parts if names]

    def state(self, optimizer: Any, group: dict[str, Any], flat: Tensor) -> dict[str, Any]:
        """The state of a group's flat parameter before the first step."""
        # torch's Adam counts steps in a tensor, the fused one where the weights are, DeepSpeed's CPU Adam in an int.
        where = flat.device if group.get("fused") else "cpu"
        step = torch.tensor(0.0, device=where) if isinstance(optimizer, torch.optim.AdamW) else 0
        return {"step": step, **{moment: torch.zeros_like(flat.data) for moment in group["moments"]}}


def _group(
    trained: dict[str, nn.Parameter], names: list[str], moments: Sequence[str], lr: float, weight_decay: float
) -> dict[str, Any]:
    parameters = [trained[name] for name in names]
    return {
        "params": parameters,
        "names": names,
        "moments": moments,
        "initial_lr": lr,
        "lr": lr,
        "weight_decay": weight_decay,
    }


class Muon(AdamW):
    """Muon on hidden matrices, with a learning rate of its own, and AdamW on the rest."""

    momentum = "momentum_buffer"

    def state_bytes(self, sizes: ParameterCounts) -> int:
        return FP32 * sizes.matrices + super().state_bytes(_rest(sizes))

    def state(self, optimizer: Any, group: dict[str, Any], flat: Tensor) -> dict[str, Any]:
        if "matrices" in group:
            return {self.momentum: torch.zeros_like(flat.data)}
        return super().state(optimizer, group, flat)

    def update_bytes(self, sizes: ParameterCounts, ranks: int, *, has_gpus: bool, offloads: bool) -> float:
        rest = super().update_bytes(_rest(sizes), ranks, has_gpus=has_gpus, offloads=offloads)
        return max(rest, MUON_TEMPORARIES * sizes.largest_matrix)

    def deepspeed(self, train: TrainConfig, offloads: bool, fused: bool) -> dict[str, Any]:
        return {}

    def client(self, train: TrainConfig, offloads: bool, fused: bool) -> Callable[[Any], torch.optim.Optimizer]:
        settings: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2), "eps": train.adam_eps}
        if fused and not offloads:
            settings["fused"] = True
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        adam: type[torch.optim.Optimizer] = torch.optim.AdamW
        if offloads:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            adam = DeepSpeedCPUAdam
        made = type("MuonAndAdamW", (_MuonStep, adam), {})
        ZERO_SUPPORTED_OPTIMIZERS.append(made)
        return lambda groups: made(groups, **settings)

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = [name for name in hidden_matrices(model) if name in trained]
        group = _group(trained, hidden, (self.momentum,), train.muon_lr, train.weight_decay)
        group |= {"momentum": train.muon_momentum, "matrices": [trained[name] for name in hidden]}
        rest = {name: p for name, p in trained.items() if name not in set(hidden)}
        return [*([group] if hidden else []), *self._groups(rest, train)]


def _rest(sizes: ParameterCounts) -> ParameterCounts:
    return ParameterCounts(sizes.parameters - sizes.matrices, 0, 0)


class _MuonStep:
    """Mixed into an Adam: the groups that have ``matrices`` take Muon's step, and no other.

    A group's one parameter is this rank's part of its flattened matrices. Momentum is partitioned like it. A matrix in
    the part of one rank is orthogonalised there; one that lies in several parts by each of their ranks, after its
    pieces have been summed over all ranks (one all-reduce each: fewer than there are ranks).
    """

    param_groups: list[dict[str, Any]]
    state: Any

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        kept = {}
        for group in self.param_groups:
            if "matrices" in group:
                (flat,) = group["params"]
                _muon_step(group, flat, self.state[flat][Muon.momentum])
                kept[flat], flat.grad = flat.grad, None  # which an Adam passes over
        super().step()  # type: ignore[misc]
        for flat, grad in kept.items():
            flat.grad = grad


def _muon_step(group: dict[str, Any], flat: Tensor, momentum: Tensor) -> None:
    """torch.optim.Muon's step with Nesterov momentum, in ``flat`` and ``momentum``."""
    beta, gradient = group["momentum"], flat.grad
    assert gradient is not None
    momentum.lerp_(gradient, 1 - beta)
    flat.mul_(1 - group["lr"] * group["weight_decay"])
    if "in_parts" not in group:
        group["in_parts"] = _in_parts(group["matrices"])
    for parameter, in_parts in zip(group["matrices"], group["in_parts"]):
        mapping = parameter._hp_mapping  # DeepSpeed's: where this rank's piece of the weight is in ``flat``
        if mapping is None and not in_parts:
            continue
        update = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if mapping is not None:
            whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
            piece = gradient.narrow(0, part.start, part.numel).lerp(momentum.narrow(0, part.start, part.numel), beta)
            update.view(-1).narrow(0, whole.start, whole.numel).copy_(piece)
        if in_parts:
            dist.all_reduce(update, group=parameter._dp_group)
        if mapping is not None:
            size = update.shape[-2:].numel()
            first, end = whole.start // size, -(-(whole.start + whole.numel) // size)
            for matrix in update.view(-1, *update.shape[-2:])[first:end]:
                matrix.copy_(_change(matrix, group["lr"]))
            piece = update.view(-1).narrow(0, whole.start, whole.numel)
            flat.narrow(0, part.start, part.numel).add_(piece.to(flat.device))


def _change(matrix: Tensor, lr: float) -> Tensor:
    """What ``torch.optim.Muon`` adds to a weight whose momentum is ``matrix``."""
    change = nn.Parameter(torch.zeros_like(matrix))
    change.grad = matrix
    torch.optim.Muon([change], lr=lr, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return change.detach()


def _in_parts(parameters: list[Any]) -> list[bool]:
    """Whether each parameter lies in the parts of several ranks (a collective)."""
    here = [p._hp_mapping is not None and p._hp_mapping.lp_fragment_address.numel < p.numel() for p in parameters]
    found = torch.tensor(here, dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=parameters[0]._dp_group)
    return [bool(value) for value in found.tolist()]


ADAMW = AdamW()
MUON = Muon()
