"""The mixture-of-experts block of LLaDA2: a sigmoid router limited to groups, stacked experts, grouped matmul.

Only values depend on the data: no loop over experts, no host synchronisation, the same kernels for any routing.

Shapes: T tokens, E experts, G groups, K experts per token, H hidden size, I expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from megatron_tide.fast import is_on
from megatron_tide.models.grouped import grouped_linear


class Router(nn.Module):
    """The K experts of each token and their weights; all in fp32.

    Scores are sigmoids. Selection adds ``expert_bias`` to them, keeps the ``groups_kept`` groups whose two best
    experts sum highest, and takes the K best experts of those. Weights are the unbiased scores, normalised to 1 (a
    single expert keeps its own), times ``scale``.
    """

    expert_bias: Tensor
    is_router = True  # a classifier, not a hidden layer: see optimizer.hidden_matrices

    def __init__(self, hidden: int, experts: int, groups: int, groups_kept: int, chosen: int, scale: float) -> None:
        super().__init__()
        self.groups, self.groups_kept, self.chosen, self.scale = groups, groups_kept, chosen, scale
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """-> expert indices [T, K] int64 and their weights [T, K] fp32."""
        score_TE = linear(hidden_TH.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            index_TK = self._select(score_TE + self.expert_bias.float())
        weight_TK = score_TE.gather(1, index_TK)
        if self.chosen > 1:
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        return index_TK, weight_TK * self.scale

    def _select(self, biased_TE: Tensor) -> Tensor:
        grouped_TGe = biased_TE.view(len(biased_TE), self.groups, -1)
        best_TG = grouped_TGe.topk(2, dim=-1).values.sum(-1)
        kept = best_TG.topk(self.groups_kept, dim=-1).indices
        dropped_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, kept, False)
        allowed_TE = grouped_TGe.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)
        return allowed_TE.topk(self.chosen, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # The bias decides ties between experts: it keeps the precision of the checkpoint when the model is cast
        # to.
        exact = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != exact.dtype:
            self.expert_bias = exact.to(self.expert_bias.device)
        return self


class Experts(nn.Module):
    """E gated feed-forward networks as three stacked tensors, laid out [E, out, in] and used transposed."""

    def __init__(self, hidden: int, width: int, experts: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Weighted sum of each token's K experts, [T, H]; the sum is taken in fp32, in the order of K."""
        tokens, chosen = index_TK.shape
        expert_R, order_R = index_TK.flatten().sort(stable=True)
        experts = torch.arange(len(self.gate_proj), device=order_R.device)
        ends_E = torch.searchsorted(expert_R, experts, right=True).to(torch.int32)
        routed_RH = _take(hidden_TH, order_R // chosen)
        gate_RI = grouped_linear(routed_RH, self.gate_proj, ends_E)
        up_RI = grouped_linear(routed_RH, self.up_proj, ends_E)
        out_RH = grouped_linear(silu(gate_RI) * up_RI, self.down_proj, ends_E)
        # Back to the tokens' own order by a permutation, not by index_add: no atomics, so the same sum on every run.
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        return _sum_for(out_RH)(out_RH, place_R.view(tokens, chosen), weight_TK)


def weighted_sum(out_RH: Tensor, place_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The rows ``place_TK`` of ``out_RH`` times ``weight_TK``, summed over K in fp32 and in order: [T, H]."""
    # One of the K at a time: all of them at once, in fp32, would be the largest tensor of a layer by far.
    sum_TH = torch.zeros(len(place_TK), out_RH.shape[1], dtype=torch.float32, device=out_RH.device)
    for place_T, share_T in zip(place_TK.unbind(1), weight_TK.unbind(1)):
        sum_TH.addcmul_(out_RH.index_select(0, place_T).float(), share_T[:, None])
    return sum_TH.to(out_RH.dtype)


@functools.cache
def compiled_sum(backend: str = "inductor") -> Callable[..., Any]:
    """:func:`weighted_sum` as one kernel, which reads each row once and keeps the sum in registers."""
    return torch.compile(weighted_sum, backend=backend, dynamic=True, fullgraph=True)


def _sum_for(out_RH: Tensor) -> Callable[..., Any]:
    # The compiled one's gradient adds up with atomics; the teacher, whose experts these are, has none.
    return compiled_sum() if out_RH.is_cuda and not out_RH.requires_grad and is_on("sum") else weighted_sum


def _take(rows_TH: Tensor, index_R: Tensor) -> Tensor:
    """Rows by index, some of them several times."""
    if rows_TH.device.type == "cpu":
        return rows_TH.index_select(0, index_R)
    return rows_TH[index_R]  # its gradient is added up in a fixed order, that of index_select by atomics
