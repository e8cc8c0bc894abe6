"""Is this teacher the right one? Asked once, before the first step, of the first window's samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_tide.diffusion import Noised
from megatron_tide.models import gold_logp
from megatron_tide.objectives import TeacherAnswer
from megatron_tide.train.step import Parts, to_device


def probe_teacher(parts: Parts, window: Sequence[Noised], vocab_size: int, teacher: str, mask_id: int) -> float:
    """Mean log-prob (nats) that the hosted teacher gives the gold tokens of ``window``, over all ranks (a collective).

    Raises:
        ValueError: on every rank alike, where it is not finite, or no better than a uniform guess over ``vocab_size``.
    """
    window = to_device(window, parts.world.device)
    answers = parts.host.score(window)
    gold = torch.cat([_gold(noised, answer).double() for noised, answer in zip(window, answers)])
    total, count = parts.world.sum_over_ranks([gold.sum().item(), float(len(gold))])
    mean, uniform = total / max(count, 1.0), -math.log(vocab_size)
    if count and not mean > uniform:  # a NaN is not greater than anything
        said = f"{mean:.2f} nats" if math.isfinite(mean) else "log-probs that are not finite"
        raise ValueError(
            f"{teacher}: gives the data's own tokens {said} on average, a uniform guess {uniform:.2f}: wrong "
            f"weights, a wrong mask token (id {mask_id}), or another chat template; --skip-teacher-probe goes on anyway"
        )
    return mean


def _gold(noised: Noised, answer: TeacherAnswer) -> torch.Tensor:
    """The gold log-probs that were asked for, or those of the pairs, from their hidden rows."""
    if answer.gold_logp is not None:
        return answer.gold_logp
    assert answer.hidden is not None
    assert answer.head_weight is not None
    return gold_logp(answer.hidden, answer.head_weight, noised.teacher_gold[noised.pair_teacher_row])
