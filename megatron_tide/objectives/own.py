"""The student's own losses: on the data, without a teacher."""

from __future__ import annotations

from torch import Tensor

from megatron_tide.objectives.common import mean_over


def denoise_loss(target_logprobs_M: Tensor, inverse_weight_M: Tensor, maskable: float) -> Tensor:
    """Diffusion: sum over masked tokens of -log p(x0) * w, divided by the count of maskable ones of the GLOBAL batch.

    ``target_logprobs_M``: log-prob of each masked token. ``inverse_weight_M``: 1 / w of its noise level, with
    w(t) = -alpha'(t) / (1 - alpha(t)); t itself for the linear schedule alpha(t) = 1 - t. ``maskable``: a number,
    counted over all ranks and micro-batches of the step. Returns a scalar; 0 with a graph where nothing is masked.
    """
    return mean_over(-(target_logprobs_M / inverse_weight_M.to(target_logprobs_M.dtype)).sum(), maskable)


def next_token_loss(next_logprobs_Q: Tensor, next_tokens: float) -> Tensor:
    """Next tokens: sum of -log p(token | tokens before it), divided by the number of such tokens of the GLOBAL batch.

    ``next_tokens``: a number, counted over all ranks and micro-batches of the step. Returns a scalar; 0 with a graph
    where there are none.
    """
    return mean_over(-next_logprobs_Q.sum(), next_tokens)
