"""The sampler with its cache against the plain one, on a student of the true architecture in fp32."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.models import load_model
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.sampling_a2d import DecodingRule
from tests.reference.generate import fill_in
from tests.reference.generate import generate as plain
from tests.support.models import tiny_student_config, tiny_teacher_config, write_hub_folder

PAD, MASK, BLOCK = 1, 2, 4
ENDS = (5, 9, 13, 17)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = tiny_teacher_config(vocab_size=24)
    return load_model(write_hub_folder(Path(tmp_path_factory.mktemp("teacher")), config, seed=5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # A small vocabulary of which several tokens end a text, so that rows do end.
    config = tiny_student_config(vocab_size=24, num_hidden_layers=3)
    return load_model(write_hub_folder(Path(tmp_path_factory.mktemp("student")), config, seed=3))


def prompts_of(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 24, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids, keep = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place], keep[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": keep}


SHAPES = [(1,), (4,), (9, 9), (3, 17, 8), (12, 1, 5, 30)]
SCHEDULES = [(1, None), (2, None), (3, 0.5), (1, 0.15), (4, 0.0)]


@pytest.mark.parametrize("lengths", SHAPES, ids=str)
@pytest.mark.parametrize(("tokens_per_step", "threshold"), SCHEDULES)
def test_same_tokens_as_the_plain_way(
    model: Any, lengths: tuple[int, ...], tokens_per_step: int, threshold: float | None
) -> None:
    for seed, new, side in itertools.product((0, 1), (1, 6, 21), ("left", "right")):
        prompts = prompts_of(lengths, seed)
        asked = padded(prompts, side)
        options: dict[str, Any] = {"max_new_tokens": new, "tokens_per_step": tokens_per_step, "threshold": threshold}
        output = model.generate(**asked, **options, eos_token_ids=ENDS)
        width = asked["input_ids"].shape[1]
        assert torch.equal(output[:, :width], asked["input_ids"])
        for row, prompt in enumerate(prompts):
            expected = plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ENDS, **options)
            answer = output[row, width:].tolist()
            assert answer[: len(expected)] == expected
            assert set(answer[len(expected) :]) <= {PAD}


@pytest.mark.parametrize("layout", ["sequence", "answer"])
@pytest.mark.parametrize(("tokens_per_step", "threshold"), SCHEDULES)
def test_the_pass_that_decided_each_token(
    model: Any, tokens_per_step: int, threshold: float | None, layout: str
) -> None:
    """In a batch as alone, counted by each row's own passes."""
    prompts, limits = prompts_of((12, 1, 5, 30), 1), {"max_new_tokens": 13, "tokens_per_step": tokens_per_step}
    ids = {"block_size": BLOCK, "mask_token_id": MASK, "pad_token_id": PAD, "eos_token_ids": ENDS}
    rule = DecodingRule(**limits, **ids, threshold=threshold, block_layout=layout)
    decoder = BlockDecoder(model, [torch.tensor(prompt) for prompt in prompts], rule, [0] * len(prompts))
    assert list(decoder.run())
    for prompt, answer, order in zip(prompts, decoder.completions(), decoder.orders()):
        expected: dict[int, int] = {}
        wanted = plain(
            model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ENDS, threshold=threshold, **limits,
            from_answer=layout == "answer", passes=expected,
        )  # fmt: skip
        assert answer.tolist() == wanted
        assert order.tolist() == [expected[place] for place in range(len(wanted))]


@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_the_teacher_decodes_with_the_same_cache(teacher: Any, lengths: tuple[int, ...]) -> None:
    ids = {"block_size": BLOCK, "mask_token_id": MASK, "pad_token_id": PAD, "eos_token_ids": ENDS}
    prompts = prompts_of(lengths, 2)
    asked = padded(prompts, "left")
    output = teacher.generate(**asked, max_new_tokens=13, tokens_per_step=2, **ids)
    for prompt, row in zip(prompts, output.tolist()):
        options: dict[str, Any] = {"max_new_tokens": 13, "tokens_per_step": 2, "threshold": None}
        expected = plain(teacher, prompt, block=BLOCK, mask_id=MASK, eos_ids=ENDS, **options)
        assert row[asked["input_ids"].shape[1] :][: len(expected)] == expected


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_least_confident_first(model: Any, threshold: float | None) -> None:
    options: dict[str, Any] = {"max_new_tokens": 14, "tokens_per_step": 1, "threshold": threshold}
    differ = 0
    for prompt in prompts_of((3, 6, 8), 5):
        expected = plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=(), least_confident_first=True, **options)
        asked = torch.tensor([prompt])
        found = model.generate(asked, **options, eos_token_ids=(), least_confident_first=True)[
            0, len(prompt) :
        ].tolist()
        assert found == expected
        differ += found != model.generate(asked, **options, eos_token_ids=())[0, len(prompt) :].tolist()
    assert differ or threshold


@pytest.mark.parametrize(("tokens_per_step", "threshold"), SCHEDULES)
@pytest.mark.parametrize(("least", "in_order"), [(0, True), (6, False), (6, True)])
def test_when_an_answer_may_end(
    model: Any, tokens_per_step: int, threshold: float | None, least: int, in_order: bool
) -> None:
    """Alone and batched, with half the vocabulary as end of text: most answers would end at once."""
    ends = tuple(range(0, model.config.vocab_size, 2))
    rules: dict[str, Any] = {"min_new_tokens": least, "eos_in_order": in_order}
    options: dict[str, Any] = {"max_new_tokens": 14, "tokens_per_step": tokens_per_step, "threshold": threshold}
    differ = 0
    prompts = prompts_of((3, 6, 8, 11), 5)
    asked = padded(prompts, "left")
    together = model.generate(**asked, **options, **rules, eos_token_ids=ends)[:, asked["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, together.tolist()):
        expected = plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ends, **options, **rules)
        assert row[: len(expected)] == expected
        assert not set(expected[:least]) & set(ends)
        differ += expected != plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ends, **options)
    assert differ or tokens_per_step > 1 or threshold


@pytest.mark.parametrize("per_step", [1, 3])
def test_masks_of_a_prompt_are_filled_in(model: Any, per_step: int) -> None:
    """Alone and batched: holes in the first block, across blocks, at the end; then also with an answer behind them."""
    holes = [(0, 1), (5, 6, 7, 8), (2, 9, 13), (16,)]
    prompts = prompts_of((6, 11, 14, 17), 6)
    for prompt, places in zip(prompts, holes):
        for place in places:
            prompt[place] = MASK
    options: dict[str, Any] = {"tokens_per_step": per_step, "eos_token_ids": ENDS}
    expected = [fill_in(model, p, block=BLOCK, mask_id=MASK, eos_ids=ENDS, tokens_per_step=per_step) for p in prompts]
    asked = padded(prompts, "right")
    filled = model.generate(**asked, **options, max_new_tokens=0)
    for row, (prompt, wanted) in enumerate(zip(prompts, expected)):
        assert filled[row, : len(prompt)].tolist() == wanted
        assert model.generate(torch.tensor([prompt]), **options, max_new_tokens=0).tolist() == [wanted]
        assert not set(wanted) & {MASK}
    aligned = prompts_of((12,), 7)[0]
    aligned[5] = MASK
    both = model.generate(torch.tensor([aligned]), **options, max_new_tokens=9)[0].tolist()
    wanted = fill_in(model, aligned, block=BLOCK, mask_id=MASK, eos_ids=ENDS, tokens_per_step=per_step)
    rule: dict[str, Any] = {"max_new_tokens": 9, "tokens_per_step": per_step, "threshold": None}
    answer = plain(model, wanted, block=BLOCK, mask_id=MASK, eos_ids=ENDS, **rule)
    assert both[: 12 + len(answer)] == wanted + answer


def test_a_streamer_gets_prompt_and_blocks(model: Any) -> None:
    class Told:
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            assert not self.ended
            self.pieces.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    told, prompt = Told(), prompts_of((6,), 8)[0]
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_ids=(), streamer=told)
    assert told.ended
    assert [len(piece) for piece in told.pieces] == [6, 2, 4, 4, 2]
    assert [token for piece in told.pieces for token in piece] == output[0].tolist()
    with pytest.raises(ValueError, match="one prompt"):
        model.generate(torch.tensor([prompt, prompt]), streamer=told)


def test_steps_are_passes_for_the_whole_answer(model: Any) -> None:
    prompt = torch.tensor([prompts_of((8,), 9)[0]])
    for steps, per_step in ((12, 1), (6, 2), (5, 3), (1, 12), (40, 1)):
        by_steps = model.generate(prompt, max_new_tokens=12, steps=steps, eos_token_ids=())
        assert torch.equal(
            by_steps, model.generate(prompt, max_new_tokens=12, tokens_per_step=per_step, eos_token_ids=())
        )


def test_rows_do_end_early_and_at_different_places(model: Any) -> None:
    """Otherwise the test above would not have tested the end of text."""
    options: dict[str, Any] = {"max_new_tokens": 21, "tokens_per_step": 1, "threshold": None}
    answers = [
        plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ENDS, **options)
        for lengths in SHAPES
        for prompt in prompts_of(lengths, 0)
    ]
    assert len({len(answer) for answer in answers if answer[-1] in ENDS}) > 2
    assert any(len(answer) == 21 and answer[-1] not in ENDS for answer in answers)


def test_mask_token_is_never_chosen(model: Any) -> None:
    """Even by a model whose favourite it is."""
    model = type(model)(model.config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[MASK] = 1.0
        model.model.norm.weight.fill_(1.0)
    for temperature in (0.0, 1.0):
        output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, temperature=temperature)
        assert MASK not in output.tolist()[0]


def test_number_of_passes(model: Any) -> None:
    """A block's first pass also encodes what came before it: no pass is spent on the cache."""

    def passes(prompt: int, new: int, per_step: int) -> int:
        rule = DecodingRule(
            block_size=BLOCK,
            mask_token_id=MASK,
            eos_token_ids=(),
            pad_token_id=PAD,
            max_new_tokens=new,
            tokens_per_step=per_step,
        )
        decoder = BlockDecoder(model, [torch.arange(3, 3 + prompt)], rule, [0])
        assert len(list(decoder.run())) == decoder.passes
        assert len(decoder.completions()[0]) == new
        return decoder.passes

    assert passes(prompt=8, new=12, per_step=1) == 12
    assert passes(prompt=8, new=12, per_step=2) == 6
    assert passes(prompt=6, new=10, per_step=4) == 3  # two positions of the prompt's block, then two whole blocks
    assert passes(prompt=7, new=1, per_step=1) == 1


def test_temperature_draws_by_row_and_seed(model: Any) -> None:
    prompts = padded(prompts_of((5, 11, 2), 4), "left")
    drawn = model.generate(**prompts, max_new_tokens=12, temperature=1.0, seed=7, eos_token_ids=())
    again = model.generate(**prompts, max_new_tokens=12, temperature=1.0, seed=[7, 8, 9], eos_token_ids=())
    other = model.generate(**prompts, max_new_tokens=12, temperature=1.0, seed=8, eos_token_ids=())
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    alone = {name: tensor[1:2] for name, tensor in prompts.items()}
    single = model.generate(**alone, max_new_tokens=12, temperature=1.0, seed=8, eos_token_ids=())
    assert torch.equal(single[0], drawn[1])


@pytest.mark.parametrize("lengths", [(9, 9), (12, 1, 5, 30)], ids=str)
@pytest.mark.parametrize(
    ("tokens_per_step", "threshold", "in_order"), [(1, None, True), (2, None, False), (3, 0.5, True)]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fixed_shapes_give_the_same_tokens(
    model: Any,
    teacher: Any,
    lengths: tuple[int, ...],
    tokens_per_step: int,
    threshold: float | None,
    in_order: bool,
    temperature: float,
) -> None:
    """What a GPU runs: one buffer under a mask, all positions through the head, a number of passes that is known."""
    ids: dict[str, Any] = {"block_size": BLOCK, "mask_token_id": MASK, "pad_token_id": PAD, "eos_token_ids": ENDS}
    rule = DecodingRule(
        **ids,
        max_new_tokens=21,
        min_new_tokens=3,
        tokens_per_step=tokens_per_step,
        threshold=threshold,
        eos_in_order=in_order,
        temperature=temperature,
    )
    prompts = [torch.tensor(prompt) for prompt in prompts_of(lengths, 3)]
    prompts[0][3:5] = MASK
    for one in (model, teacher):
        plainly, fixed = (BlockDecoder(one, prompts, rule, range(len(prompts)), static) for static in (False, True))
        # A row whose answer has ended stays where a recorded pass is for a number of rows.
        fixed._passes.record, fixed._passes._recorded = True, lambda work: None
        assert len(list(plainly.run())) == plainly.passes
        done = list(fixed.run())
        assert len(done) == fixed.passes >= plainly.passes
        assert done.count(True) == len({int(number) for number in torch.tensor(done).cumsum(0)}) - (not done[0])
        for mine, theirs in zip(fixed.completions(), plainly.completions(), strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(fixed.prompts(), plainly.prompts(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_recorded_pass_is_replayed_until_its_rows_change() -> None:
    """With a stand-in for CUDA graphs, which replays what was recorded."""
    from megatron_tide.models.decoding_a2d import _Passes

    class Graph:
        def __init__(self, work: Any) -> None:
            self.replay = work

    passes, ran = _Passes(record=True), []
    recorded: list[str] = []

    def record(work: Any) -> Graph:
        recorded.append(work.args[0])
        return Graph(work)

    passes._recorded = record  # type: ignore[method-assign, assignment]
    for name in ("first", "second", "third"):
        passes(4, partial(ran.append, name))
    assert ran == ["first", "second", "second"]
    assert recorded == ["second"]
    passes(8, partial(ran.append, "longer"))
    passes.forget()
    passes(4, partial(ran.append, "again"))
    assert ran[3:] == ["longer", "again"]
    assert recorded == ["second"]


def test_without_a_graph_each_pass_is_launched(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here, so recording fails: one warning, the same tokens."""
    rule = DecodingRule(block_size=BLOCK, mask_token_id=MASK, eos_token_ids=(), pad_token_id=PAD, max_new_tokens=9)
    prompt = torch.tensor(prompts_of((6,), 8)[0])
    plainly, fixed = (BlockDecoder(model, [prompt], rule, [0], static) for static in (False, True))
    fixed._passes.record = True
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    list(plainly.run())
    with pytest.warns(UserWarning, match="no CUDA graph") as caught:
        list(fixed.run())
    assert len(caught) == 1
    assert torch.equal(fixed.completions()[0], plainly.completions()[0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_outputs_that_are_no_numbers_end_it_in_one_line(
    model: Any, monkeypatch: pytest.MonkeyPatch, static: bool, threshold: float | None
) -> None:
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: head(hidden) * torch.nan, raising=False)
    ids = {"mask_token_id": MASK, "eos_token_ids": ENDS, "pad_token_id": PAD}
    rule = DecodingRule(block_size=BLOCK, max_new_tokens=9, threshold=threshold, **ids)
    with pytest.raises(ValueError, match="the model's outputs are not numbers"):
        list(BlockDecoder(model, [torch.tensor(prompts_of((6,), 8)[0])], rule, [0], static).run())


def test_rows_that_ended_leave_the_batch(model: Any) -> None:
    """A row whose answer has ended costs no more: the last passes see fewer rows."""
    rule = DecodingRule(block_size=BLOCK, mask_token_id=MASK, eos_token_ids=ENDS, pad_token_id=PAD, max_new_tokens=24)
    prompts = [torch.tensor(prompt) for prompt in prompts_of((3, 17, 8, 12, 1, 5), 1)]
    decoder = BlockDecoder(model, prompts, rule, range(len(prompts)))
    rows = [len(decoder.rows_A) for _ in decoder.run()]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 2
    lengths = [len(answer) for answer in decoder.completions()]
    blocks = [-(-(len(prompt) % BLOCK + length) // BLOCK) for prompt, length in zip(prompts, lengths)]
    assert rows[0] == len(prompts)
    assert max(blocks) > min(blocks)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"threshold": 1.5}, "threshold"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_beams": 2}, "num_beams"),
        ({"seed": [1, 2, 3]}, "seeds"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 4, "tokens_per_step": 2}, "use one of them"),
    ],
)
def test_wrong_settings_are_named(model: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        model.generate(torch.tensor([[5, 6]]), **options)
    assert "\n" not in str(caught.value)
