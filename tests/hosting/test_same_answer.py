"""Every hosting gives the replicated teacher's numbers, whatever the objective, the ranks and the passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosting.backends import hostings, joined, loader_of, teacher_of
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks
# Of log-probs and of hidden rows. Every hosting computes from the same weights in the same precision. What may differ
# is which micro-batches go through the experts together, and with that the order in which a matmul adds. That is the
# last bits of fp32; in bf16 one bit of 8 of a value below 4, in each of three layers: 3 * 4 / 2**8.
BOUND = {"fp32": 1e-5, "bf16": 0.05}
STEPS = 3  # zero3 records its trace in the first, and looks ahead from the second on
STRATEGIES = {
    "tide-cross": {"target_logprobs"},
    "kl": {"hidden", "head_weight"},
    "tide-bridge": {"target_logprobs", "hidden", "head_weight"},
}
TOO_MANY_STAGES = {1: ("pipeline_2", "pipeline_4"), 2: ("pipeline_4",)}


def compare(runs, chosen):
    """By run and hosting: of each field the largest difference and how many numbers were compared; and all lengths."""
    found, lengths = {}, set()
    with joined() as world:
        for run, flags in runs.items():
            strategy, loader = loader_of(flags, world)
            asked = [loader(step) for step in range(STEPS)]
            lengths |= {batch.teacher.input_ids.shape for microbatches in asked for batch in microbatches}
            replicated = teacher_of(flags, strategy, world)
            wanted = [output for microbatches in asked for output in replicated.score(microbatches)]
            for hosting, more in chosen.items():
                teacher = teacher_of({**flags, **more}, strategy, world)
                outputs = [output for microbatches in asked for output in teacher.score(microbatches)]
                found[run, hosting] = differences(outputs, wanted)
    return found, lengths


def differences(outputs, wanted):
    apart = {}
    for mine, theirs in zip(outputs, wanted, strict=True):
        for field in ("target_logprobs", "hidden", "head_weight"):
            value, reference = getattr(mine, field), getattr(theirs, field)
            assert (value is None) == (reference is None), field
            if value is not None:
                assert (value.shape, value.dtype) == (reference.shape, reference.dtype), field
                largest, count = apart.get(field, (0.0, 0))
                off = (value.double() - reference.double()).abs().max().item() if value.numel() else 0.0
                apart[field] = max(largest, off), count + value.numel()
    return apart


def check(chain, world, runs, chosen):
    """Ask the ``chosen`` hostings; ``runs`` are (teacher, precision, strategy, CompDemo[, teacher's context])."""
    flags = {
        run: chain.run(
            Path("nowhere"),
            teacher=str(run[0]),
            teacher_dtype=run[1],
            strategy=run[2],
            compdemo=run[3],
            teacher_context=(*run[4:], "full")[0],
            micro_batch_size=1,
        )
        for run in runs
    }
    for found, lengths in run_on_ranks(compare, world, flags, chosen, timeout=280):
        assert len(lengths) > 3, "the micro-batches should differ in length"
        assert len(found) == len(runs) * len(chosen)
        for (run, hosting), apart in found.items():
            assert apart.keys() == STRATEGIES[run[2]]
            for field, (largest, count) in apart.items():
                assert count > 0
                assert largest <= BOUND[run[1]], (run, hosting, field)


@pytest.mark.parametrize("world", [1, 2])
def test_every_strategy_and_precision(chain, mixture, dense, autoregressive, tmp_path, world):
    runs = [
        (mixture, dtype, strategy, compdemo)
        for dtype in ("fp32", "bf16")
        for strategy in STRATEGIES
        for compdemo in (True, False)
    ]
    runs += [(dense, dtype, "tide-bridge", True) for dtype in ("fp32", "bf16")]
    runs += [(autoregressive, "fp32", "tide-bridge", False, "causal")]
    every = hostings(tmp_path)
    check(chain, world, runs, {name: every[name] for name in every if name not in TOO_MANY_STAGES[world]})


def test_two_pipelines_of_two_stages_and_one_of_four(chain, mixture, dense, autoregressive, tmp_path):
    """Four stages have two that are neither the first nor the last."""
    runs = [(mixture, "fp32", "tide-bridge", True), (dense, "bf16", "tide-cross", False)]
    runs += [(autoregressive, "fp32", "tide-cross", False, "causal")]
    check(chain, 4, runs, {name: hostings(tmp_path)[name] for name in ("pipeline_2", "pipeline_4")})
