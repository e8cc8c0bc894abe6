"""The autoregressive loss: each token of the clean text from the tokens before it, without a teacher."""

from __future__ import annotations

from torch import Tensor

from megatron_tide.objectives.common import mean_over


def next_token_loss(next_logprobs_Q: Tensor, next_tokens: float) -> Tensor:
    """Sum of -log p(token | tokens before it), divided by the number of such tokens of the GLOBAL batch.

    ``next_tokens``: a number, counted over all ranks and micro-batches of the step. Returns a scalar; 0 with a graph
    where there are none.
    """
    return mean_over(-next_logprobs_Q.sum(), next_tokens)
