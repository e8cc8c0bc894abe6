"""The diffusion loss: what the student learns from the data alone."""

from __future__ import annotations

from torch import Tensor

from megatron_tide.objectives.common import mean_over


def denoise_loss(target_logprobs_M: Tensor, t_M: Tensor, maskable: float) -> Tensor:
    """Sum over masked tokens of -log p(x0) / t, divided by the maskable tokens of the GLOBAL batch.

    ``target_logprobs_M``: log-prob of each masked token. ``t_M``: the timestep of that token's sample, in (0, 1].
    ``maskable``: a number, counted over all ranks and micro-batches of the step. w(t) = -alpha'(t) / (1 - alpha(t))
    = 1 / t for the linear schedule alpha(t) = 1 - t. Returns a scalar; 0 with a graph where nothing is masked.
    """
    return mean_over(-(target_logprobs_M / t_M.to(target_logprobs_M.dtype)).sum(), maskable)
