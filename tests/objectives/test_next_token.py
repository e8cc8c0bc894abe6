"""Strategies ar and joint: inputs and losses against one unpacked forward per sample, and against transformers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_tide.config import StrategyConfig
from megatron_tide.diffusion import MASKINGS, DistillBatch, build_inputs, noise
from megatron_tide.models import masked_hidden_states
from megatron_tide.models.families import fresh_model, read_config
from megatron_tide.objectives import (
    Counts,
    Strategy,
    TeacherOutputs,
    build_strategy,
    denoise_loss,
    next_token_loss,
)
from tests.diffusion import samples
from tests.reference import next_token as reference
from tests.support.models import tiny_student_config

BLOCK = samples.STUDENT_BLOCK
CONFIG = tiny_student_config(vocab_size=1024)
NORMS = {"rtol": 1e-5, "atol": 1e-7}  # Qwen3 normalises in fp32
ITEMS = [
    samples.make(0, (5, 0), [(1, 1)] * 9, student_only=True),
    samples.make(1, (1, 0), [(1, 1)] * 3, student_only=True),
    samples.make(2, (9, 0), [(2, 1)] * 7, student_only=True, ended=False),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh_model(CONFIG, seed=3).double()


def laid_out(items: list[dict[str, Any]], strategy: Strategy, padding: int = 0, block: int = BLOCK) -> tuple[Any, Any]:
    batch = samples.collate(items, padding)
    drawn = noise(batch, seed=1, epoch=0, masking=MASKINGS["synchronous"])
    mask = samples.STUDENT_MASK
    return drawn, build_inputs(
        batch, drawn, student_block=block, student_mask_id=mask, teacher=None, student=strategy.student
    )


def losses(model: Any, inputs: DistillBatch, strategy: Strategy, counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
    """(denoising, next token), as the training step computes them."""
    hidden = masked_hidden_states(model, inputs.student)
    scores = strategy.score(hidden, model.head_weight, inputs, TeacherOutputs(), torch.ones(0))
    weight = inputs.inverse_weight[inputs.student_level]
    return (
        denoise_loss(scores.target_logprobs, weight, counts.maskable),
        next_token_loss(scores.next_logprobs, counts.next_tokens),
    )


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("score_prompt", [False, True], ids=["response", "prompt-too"])
@pytest.mark.parametrize("name", ["ar", "joint"])
@pytest.mark.parametrize("block", [BLOCK, BLOCK // 2])
def test_equals_one_forward_per_sample(model: Any, name: str, score_prompt: bool, block: int) -> None:
    strategy = build_strategy(StrategyConfig(strategy=name, score_prompt=score_prompt), None)
    drawn, inputs = laid_out(ITEMS, strategy, padding=3, block=block)
    counts = Counts(maskable=31, chunks=0, pairs=0, next_tokens=47)  # global: more than this micro-batch holds
    denoise, next_token = losses(model, inputs, strategy, counts)
    expected_next = sum(sum(reference.next_token_terms(model, item, score_prompt)) for item in ITEMS) / 47
    expected_denoise = torch.zeros(())
    if name == "joint":
        for row, item in enumerate(ITEMS):
            masked = drawn.student_masked[row, : len(item["student_ids"])].tolist()
            weight = float(inputs.inverse_weight[row])
            expected_denoise = expected_denoise + sum(
                reference.denoising_terms(model, item, masked, weight, block, samples.STUDENT_MASK)
            )
        assert expected_denoise > 0
    expected_denoise = expected_denoise / 31
    torch.testing.assert_close(next_token, expected_next)
    torch.testing.assert_close(denoise, expected_denoise, check_dtype=False)
    ours, theirs = gradients(model, denoise + next_token), gradients(model, expected_denoise + expected_next)
    for grad, expected in zip(ours.values(), theirs.values()):
        torch.testing.assert_close(grad, expected, **NORMS)


def test_what_is_scored() -> None:
    """The response with its first end of text, and with the flag the prompt from its second token; no filling EOS."""
    for score_prompt in (False, True):
        strategy = build_strategy(StrategyConfig(strategy="joint", score_prompt=score_prompt), None)
        _, inputs = laid_out(ITEMS, strategy)
        wanted = [[item["student_ids"][p] for p in reference.predicted(item, score_prompt)] for item in ITEMS]
        assert inputs.next_targets.tolist() == [token for tokens in wanted for token in tokens]
        assert wanted[0].count(samples.STUDENT_EOS) == 1 < ITEMS[0]["student_ids"].count(samples.STUDENT_EOS)
        assert wanted[2].count(samples.STUDENT_EOS) == 0, "a cut response has no end"
    assert len(wanted[1]) == ITEMS[1]["student_content_end"]


def test_the_students_own_responses_are_no_next_tokens() -> None:
    """Of a sample whose response the student wrote, only its prompt is scored, and only with the flag."""
    for name, score_prompt in product(("ar", "joint"), (False, True)):
        strategy = build_strategy(StrategyConfig(strategy=name, score_prompt=score_prompt), None)
        batch = replace(samples.collate(ITEMS), own=torch.tensor([True, False, True]))
        drawn = noise(batch, seed=1, epoch=0, masking=MASKINGS["synchronous"])
        inputs = build_inputs(
            batch, drawn, student_block=BLOCK, student_mask_id=1, teacher=None, student=strategy.student
        )
        wanted = [
            [
                item["student_ids"][p]
                for p in reference.predicted(item, score_prompt)
                if p < item["student_prompt"] or not own
            ]
            for item, own in zip(ITEMS, (True, False, True))
        ]
        assert [len(tokens) > 0 for tokens in wanted] == [score_prompt, True, score_prompt]
        assert inputs.next_targets.tolist() == [token for tokens in wanted for token in tokens]


def test_ar_reads_one_copy_and_denoises_nothing() -> None:
    _, inputs = laid_out(ITEMS, build_strategy(StrategyConfig(strategy="ar"), None))
    assert not inputs.student.attention.noised.any()
    assert inputs.student.attention.valid.sum(1).tolist() == [item["student_content_end"] for item in ITEMS]
    assert (inputs.maskable, len(inputs.student_targets)) == (0, 0)


def test_ar_equals_transformers_loss_of_the_same_weights(model: Any) -> None:
    theirs = Qwen3ForCausalLM(read_config({**CONFIG, "model_type": "qwen3"})[1]).double()
    theirs.load_state_dict(model.state_dict())
    ids = torch.tensor([[7, 3, 900, 41, 12, 5, 88, 800]])
    item = samples.make(0, (1, 0), [(1, 1)] * 6, student_only=True) | {"student_ids": ids[0].tolist()}
    strategy = build_strategy(StrategyConfig(strategy="ar", score_prompt=True), None)
    _, inputs = laid_out([item], strategy)
    _, ours = losses(model, inputs, strategy, Counts(maskable=0, chunks=0, pairs=0, next_tokens=7))
    torch.testing.assert_close(ours, theirs(ids, labels=ids).loss, check_dtype=False)


@pytest.mark.parametrize("name", ["ar", "joint"])
def test_micro_batches_add_up(model: Any, name: str) -> None:
    strategy = build_strategy(StrategyConfig(strategy=name), None)
    whole, parts = laid_out(ITEMS, strategy)[1], [laid_out([item], strategy)[1] for item in ITEMS]
    counts = Counts(
        maskable=sum(part.maskable for part in parts),
        chunks=0,
        pairs=0,
        next_tokens=sum(len(part.next_targets) for part in parts),
    )
    assert (whole.maskable, len(whole.next_targets)) == (counts.maskable, counts.next_tokens)
    together = gradients(model, sum(losses(model, whole, strategy, counts)))
    split = gradients(model, sum(sum(losses(model, part, strategy, counts)) for part in parts))
    for grad, expected in zip(split.values(), together.values()):
        torch.testing.assert_close(grad, expected, **NORMS)
