"""The student's optimizer: its DeepSpeed settings, parameter groups, state, and memory.

To add an optimizer, write a class like this and its line in ``choices.OPTIMIZERS``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_tide.config import TrainConfig

FP32 = 4  # bytes


class AdamW:
    """AdamW on fp32 master weights; weight decay on matrices only."""

    moments = ("exp_avg", "exp_avg_sq")  # one fp32 tensor of a parameter's shape each; checkpoints store them by name

    @property
    def state_bytes(self) -> int:
        """Bytes of state per trained parameter, summed over all ranks."""
        return FP32 * len(self.moments)

    def update_bytes(self, *, has_gpus: bool, offloads: bool) -> int:
        """Bytes of temporaries per parameter in the update: torch's AdamW has some, DeepSpeed's CPU Adam none."""
        return 0 if offloads else FP32 if has_gpus else 2 * FP32

    def deepspeed(self, train: TrainConfig, offloads: bool) -> dict[str, Any]:
        """The ``optimizer`` section of the DeepSpeed configuration."""
        # torch's AdamW needs no compiled op; with offload, DeepSpeed's CPU Adam is the faster one.
        betas = [train.beta1, train.beta2]
        params = {"lr": train.lr, "betas": betas, "eps": train.adam_eps, "torch_adam": not offloads}
        return {"type": "AdamW", "params": params}

    def groups(self, model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
        """The trained parameters of ``model`` as optimizer groups, none of them empty."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def state(self, optimizer: Any, flat: Tensor) -> dict[str, Any]:
        """The state of one of the optimizer's flat parameters before the first step."""
        # torch's Adam counts steps in a tensor, DeepSpeed's CPU Adam in an int.
        step = torch.tensor(0.0) if type(optimizer) is torch.optim.AdamW else 0
        return {"step": step, **{moment: torch.zeros_like(flat.data) for moment in self.moments}}


ADAMW = AdamW()
