"""The habits of transformers: what ``generate`` and ``forward`` honour as anywhere, and what they refuse by name."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MaxLengthCriteria, StaticCache, StoppingCriteriaList

from megatron_tide.models import load_model
from megatron_tide.models.sampling_a2d import DecodingRule, choose_tokens, gumbel_noise
from tests.support.models import tiny_student_config, write_hub_folder

PAD, MASK = 1, 2
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
LENGTH = PROMPT.shape[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = tiny_student_config(vocab_size=24, num_hidden_layers=2)
    loaded = load_model(write_hub_folder(Path(tmp_path_factory.mktemp("student")), config, seed=3))
    loaded.generation_config = GenerationConfig(eos_token_id=23, pad_token_id=PAD, do_sample=False)
    return loaded


def answer(model: Any, **options: Any) -> list[int]:
    return model.generate(PROMPT, **{"max_new_tokens": 12, "eos_token_ids": (), **options})[0, LENGTH:].tolist()


def test_a_field_of_a_generation_config_means_what_the_keyword_means(model: Any) -> None:
    greedy = answer(model)
    assert model.generate(PROMPT, GenerationConfig(max_new_tokens=12, eos_token_id=0))[0, LENGTH:].tolist() == answer(
        model, eos_token_ids=None, eos_token_id=0
    )
    for fields in ({"do_sample": True, "temperature": 2.0}, {"temperature": 2.0}, {"do_sample": True, "top_k": 3}):
        config = GenerationConfig(max_new_tokens=12, **fields)
        given = model.generate(PROMPT, generation_config=config, seed=4, eos_token_ids=())[0, LENGTH:].tolist()
        assert given == answer(model, seed=4, **fields) != greedy
    own = copy.copy(model.generation_config)
    try:
        model.generation_config = GenerationConfig(max_new_tokens=5, tokens_per_step=2)
        assert len(answer(model, max_new_tokens=None)) == 5
        assert len(answer(model, max_new_tokens=None, max_length=LENGTH + 9)) == 9
        assert len(model.generate(PROMPT, GenerationConfig(max_length=LENGTH + 7), eos_token_ids=())[0]) == LENGTH + 7
        assert answer(model, steps=12) == answer(model, tokens_per_step=1) == greedy
    finally:
        model.generation_config = own


def test_an_adapter_with_tokens_before_the_prompt_is_not_ignored(model: Any) -> None:
    class PeftModel:
        """As PEFT does it, while it generates with prompt or prefix tuning."""

        def prepare_inputs_for_generation(self, *_: Any) -> None: ...

    own, greedy = model.prepare_inputs_for_generation, answer(model)
    try:
        model.prepare_inputs_for_generation = PeftModel().prepare_inputs_for_generation
        with pytest.raises(
            ValueError, match=r"generate: the adapter has tokens before the prompt .* such as LoRA or IA3"
        ):
            answer(model)
        model.prepare_inputs_for_generation = own  # what it leaves
        assert answer(model) == greedy
    finally:
        del model.prepare_inputs_for_generation


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"output_scores": True},
        {"treshold": 0.9},
    ],
    ids=str,
)
def test_what_block_decoding_does_not_have_is_refused_in_either_form(model: Any, fields: dict[str, Any]) -> None:
    (name,) = fields
    for options in (fields, {"generation_config": GenerationConfig(**fields)}):
        with pytest.raises(ValueError, match=f"block decoding has no {name}") as refused:
            model.generate(PROMPT, **options)
        assert "\n" not in str(refused.value)
    for given, words in (
        (None, "pass input_ids"),
        ([[5, 6]], "pass input_ids"),
        ({"input_ids": PROMPT}, r"generate\(\*\*"),
        (PROMPT[:0], "pass input_ids"),
        (PROMPT.float(), "pass input_ids"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(given)
    for mask in (torch.ones(1, 9), torch.ones(1, 1, LENGTH, LENGTH)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*, input_ids have \[1, 6\]"):
            model.generate(PROMPT, attention_mask=mask)
    for asked in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"num_return_sequences is {asked}; use a whole number, 1 or more"):
            answer(model, num_return_sequences=asked, do_sample=True)
    with pytest.raises(ValueError, match=r"max_new_tokens is 4\.5; use a whole number"):
        answer(model, max_new_tokens=4.5)
    with pytest.raises(ValueError, match="generation_config is of type dict; use a GenerationConfig"):
        model.generate(PROMPT, {"max_new_tokens": 4})
    with pytest.raises(ValueError, match="no logits_processor"):
        model.generate(PROMPT, logits_processor=[print])
    same = {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "use_cache": False,
        "logits_processor": [],
        "output_scores": False,
    }
    assert answer(model, **same, synced_gpus=None) == answer(model)


def test_a_temperature_of_a_config_needs_do_sample_where_false_cannot_be_told(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Version4(GenerationConfig):
        """As transformers 4 makes them: what was not stated has a default."""

        def __init__(self, **stated: Any) -> None:
            super().__init__(**{"do_sample": False, "temperature": 1.0, "top_k": 50, **stated})

    monkeypatch.setattr(sys.modules[type(model).generate.__module__], "GenerationConfig", Version4)
    warm = Version4(temperature=2.0)
    with pytest.raises(ValueError, match=r"config has temperature 2\.0 and not do_sample=True"):
        model.generate(PROMPT, warm)
    rule: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": (), "seed": 4}
    drawn = answer(model, temperature=2.0, seed=4)
    for config in (warm, Version4(temperature=2.0, do_sample=True)):
        assert model.generate(PROMPT, config, do_sample=True, **rule)[0, LENGTH:].tolist() == drawn
    assert model.generate(PROMPT, warm, do_sample=False, **rule)[0, LENGTH:].tolist() == answer(model)


def test_draws_follow_torchs_seed_a_generator_or_the_seed(model: Any) -> None:
    def drawn(**options: Any) -> list[int]:
        return answer(model, do_sample=True, **options)

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    torch.manual_seed(1)
    assert first == drawn() != second
    state = torch.random.get_rng_state()
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 6))
    assert drawn(generator=one) == drawn(generator=torch.Generator().manual_seed(5)) != drawn(generator=other)
    assert drawn(seed=3) == drawn(seed=[3]) != drawn(seed=4)
    assert drawn(seed=3) == drawn(seed=np.int64(3)) == drawn(seed=torch.tensor(3)) == drawn(seed=torch.tensor([3]))
    answer(model)
    assert torch.equal(state, torch.random.get_rng_state())


def test_top_k_and_top_p_leave_out_what_is_unlikely(model: Any) -> None:
    assert answer(model, do_sample=True, top_k=1) == answer(model, do_sample=True, top_p=1e-6) == answer(model)
    logits = torch.log(torch.tensor([0.35, 0.3, 1.0, 0.2, 0.15]))  # the third is the mask token
    rule: dict[str, Any] = {"block_size": 4, "mask_token_id": 2, "eos_token_ids": (), "pad_token_id": 0}
    seeds, places, turn = torch.arange(20000), torch.zeros(20000, dtype=torch.int64), torch.tensor(1)
    for settings, shares in (
        ({"top_k": 2}, [0.35, 0.3, 0, 0, 0]),
        ({"top_p": 0.6}, [0.35, 0.3, 0, 0, 0]),
        ({"top_p": 0.66}, [0.35, 0.3, 0, 0.2, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0.35, 0.3, 0, 0, 0]),
        ({"top_k": 99, "top_p": 1.0}, [0.35, 0.3, 0, 0.2, 0.15]),
    ):
        noise = gumbel_noise(seeds, places, turn, 5)
        drawn = DecodingRule(**rule, temperature=1.0, **settings)
        tokens, confidence = choose_tokens(logits.repeat(20000, 1), drawn, noise)
        wanted = torch.tensor(shares) / sum(shares)
        assert torch.allclose(torch.bincount(tokens, minlength=5) / 20000, wanted, atol=0.015), settings
        assert torch.allclose(confidence, torch.tensor([0.35, 0.3, 0, 0.2, 0.15])[tokens])  # of the whole distribution
    for mistake in ({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(mistake))):
            answer(model, do_sample=True, **mistake)


def test_several_sequences_of_a_prompt_stand_together(model: Any) -> None:
    two = torch.cat((PROMPT, PROMPT.flip(1)))
    drawn: dict[str, Any] = {"max_new_tokens": 8, "eos_token_ids": (), "do_sample": True}
    many = model.generate(two, num_return_sequences=3, seed=7, **drawn)
    assert torch.equal(many[:, :LENGTH], two.repeat_interleave(3, 0))
    for row in range(6):
        assert torch.equal(many[row], model.generate(two[row // 3][None], seed=7 + row, **drawn)[0])
    with pytest.raises(ValueError, match="2 greedy answers are all the same"):
        answer(model, num_return_sequences=2)


class Letters:
    """Decodes token 3 as a, 4 as b, and so on."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(94 + index) for index in ids)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_stops_where_the_caller_says_so(model: Any, streamed: bool) -> None:
    class Told(list[int]):
        def put(self, value: torch.Tensor) -> None:
            self.extend(value.tolist())

        def end(self) -> None:
            self.append(-1)

    whole = answer(model)
    text = Letters().decode(whole)
    place = next(n for n in range(5, 11) if text.find(text[n : n + 2]) == n)
    streamer = Told() if streamed else None
    found = answer(model, stop_strings=[text[place : place + 2], "?"], tokenizer=Letters(), streamer=streamer)
    assert found == whole[: place + 2]
    assert streamer is None or streamer == [*PROMPT[0].tolist(), *found, -1]
    criteria = StoppingCriteriaList([MaxLengthCriteria(LENGTH + 7)])
    assert answer(model, stopping_criteria=criteria) == answer(model, stopping_criteria=criteria[0]) == whole[:7]
    assert (
        answer(model, stopping_criteria=[lambda ids, _: ids[0, -1] == whole[4]]) == whole[: whole.index(whole[4]) + 1]
    )
    two = torch.cat((PROMPT, PROMPT.flip(1)))
    rule: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": ()}
    both = model.generate(two, **rule, stop_strings=text[place : place + 2], tokenizer=Letters())
    assert both[0, LENGTH:].tolist() == found + [PAD] * (both.shape[1] - LENGTH - len(found))
    alone = model.generate(two[1:], **rule, stop_strings=text[place : place + 2], tokenizer=Letters())
    assert both[1, : alone.shape[1]].tolist() == alone[0].tolist()
    for odd in ("", ["x", ""], [3]):
        with pytest.raises(ValueError, match=r"stop_strings are .*; use texts that are not empty"):
            answer(model, stop_strings=odd, tokenizer=Letters())
    with pytest.raises(ValueError, match="stop_strings need tokenizer"):
        answer(model, stop_strings="x")


def test_criteria_see_a_batch_as_if_it_wrote_token_by_token(model: Any) -> None:
    """The prompts with their padding, and rows that are done padded: as lm-eval's own criterion wants it."""
    padded, rule = (
        torch.tensor([[PAD, PAD, PAD, 5, 6, 7], [*range(5, 11)]]),
        {"max_new_tokens": 12, "eos_token_ids": ()},
    )
    whole = model.generate(padded, **rule)[:, LENGTH:].tolist()
    asked: list[list[list[int]]] = []

    def at_5_and_9(ids: torch.Tensor, scores: None) -> torch.Tensor:
        asked.append(ids.tolist())
        return torch.tensor([ids.shape[1] >= LENGTH + 5, ids.shape[1] >= LENGTH + 9])

    found = model.generate(padded, **rule, stopping_criteria=[at_5_and_9])
    assert found[:, LENGTH:].tolist() == [whole[0][:5] + [PAD] * 4, whole[1][:9]]
    assert [len(ids[0]) for ids in asked[:9]] == [LENGTH + n for n in range(1, 10)]
    for ids in asked[:9]:
        n = len(ids[0]) - LENGTH
        assert ids[0] == [*padded[0].tolist(), *(whole[0][:5] + [PAD] * 9)[:n]]
        assert ids[1] == [*padded[1].tolist(), *whole[1][:n]]
    both = model.generate(padded, **rule, stopping_criteria=lambda ids, _: ids.shape[1] >= LENGTH + 7)
    assert both[:, LENGTH:].tolist() == [row[:7] for row in whole]
    ends = whole[0][2]  # one row ends by itself, and is no longer waited for
    rule["eos_token_ids"] = (ends,)
    first = whole[0].index(ends) + 1
    late = model.generate(padded, **rule, stopping_criteria=lambda ids, _: ids.shape[1] >= LENGTH + 11)
    assert late[0, LENGTH : LENGTH + first].tolist() == whole[0][:first]
    assert late.shape[1] <= LENGTH + 11


def test_lengths_and_the_form_of_the_result(model: Any) -> None:
    result = model.generate(PROMPT, max_length=LENGTH + 4, eos_token_ids=(), return_dict_in_generate=True)
    assert result.sequences.tolist() == [PROMPT[0].tolist() + answer(model)[:4]]
    with pytest.raises(ValueError, match="max_length is 6, and the prompt has 6 tokens"):
        model.generate(PROMPT, max_length=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(model)
    with pytest.warns(UserWarning, match="the model was made for 512"):
        answer(model, max_new_tokens=512, block_size=512, tokens_per_step=512)


def test_forward_returns_what_it_is_asked_for_or_refuses(model: Any) -> None:
    with torch.no_grad():
        plain = model(PROMPT)
        full = model(PROMPT, use_cache=True, output_hidden_states=True)
        assert plain.past_key_values is None
        assert plain.hidden_states is None
        assert torch.equal(plain.logits, full.logits)
        assert torch.equal(full.hidden_states[0], model.model.embed_tokens(PROMPT))
        assert torch.equal(full.hidden_states[-1], model.backbone(PROMPT))
        assert len(full.hidden_states) == model.config.num_hidden_layers + 1
        assert full["past_key_values"] is full.past_key_values is full.cache
        (logits,) = model(PROMPT, return_dict=False)
        assert torch.equal(logits, plain.logits)
        asked = copy.deepcopy(model)
        asked.config.output_hidden_states, asked.config.return_dict = True, False
        assert torch.equal(asked(PROMPT)[1][-1], full.hidden_states[-1])
        assert asked(PROMPT, output_hidden_states=False, return_dict=True).hidden_states is None
        # The published sampler: the prefix once, then a block against a copy of its cache, with padding in front.
        ids = torch.cat((torch.full((1, 2), PAD), PROMPT), 1)
        seen = (torch.arange(8) >= 2).expand(1, 1, 8, 8) & (torch.arange(8) >= 2)[:, None]
        past = model(ids, attention_mask=seen, position_ids=(torch.arange(8) - 2).clamp(min=0)[None], use_cache=True)
        block = torch.full((1, 4), MASK)
        attend = (torch.arange(12) >= 2).expand(1, 1, 4, 12)
        where: dict[str, Any] = {
            "attention_mask": attend,
            "position_ids": torch.arange(6, 10)[None],
            "use_cache": False,
        }
        step = model(block, past_key_values=copy.deepcopy(past.past_key_values), **where)
        again = model(block, cache=past.past_key_values, **where)
        assert step.past_key_values is None
        assert torch.equal(step.logits, again.logits)
        assert past.past_key_values.get_seq_length() == 12
        both, blocks = torch.cat((PROMPT, block), 1), torch.tensor([0] * 6 + [1] * 4)
        expected = model(both, attention_mask=(blocks[:, None] >= blocks)[None, None]).logits[:, 6:]
        assert torch.allclose(step.logits, expected, atol=1e-5)
    refused_too = {"labels": PROMPT, "output_attentions": True, "inputs_embeds": torch.ones(1)}
    refused_too["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)  # its empty places are no text
    for name, value in {**refused_too, "cache": ((PROMPT, PROMPT),)}.items():
        name = "past_key_values" if name == "cache" else name
        with pytest.raises(ValueError, match=f"forward: {name} ") as refused:
            model(PROMPT, **{name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_found_without_a_mask(model: Any, left: bool) -> None:
    rows = [[PAD, 5, 6, PAD, 8, 9], [PAD, 11, 12]]  # a pad that every row has is text
    rows = rows if left else [row[::-1] for row in rows]
    pads = [[], [PAD] * 3]
    padded = [more + row if left else row + more for row, more in zip(rows, pads)]
    found = model.generate(torch.tensor(padded).int(), max_new_tokens=8, eos_token_ids=())
    for row, ids in enumerate(rows):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=8, eos_token_ids=())
        assert found[row, -8:].tolist() == alone[0, len(ids) :].tolist()
    with pytest.warns(UserWarning, match="taken for text; pass attention_mask"):
        model.generate(torch.tensor(padded), max_new_tokens=8, eos_token_ids=(PAD,))


def test_attention_stays_our_own(model: Any) -> None:
    """The others would take the mask for numbers to add, and know nothing of the cache."""
    changed = copy.deepcopy(model)
    changed.set_attn_implementation("sdpa")
    assert answer(changed, max_new_tokens=20) == answer(model, max_new_tokens=20)
    changed.config._attn_implementation = "eager"
    assert answer(changed, max_new_tokens=20) == answer(model, max_new_tokens=20)


def test_offloaded_weights_are_brought_where_they_are_used(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="NOT TESTED: accelerate is not installed")
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert offloaded.lm_head.weight.device.type == "meta"
    assert answer(offloaded) == answer(model)
    assert answer(offloaded, do_sample=True, seed=2) == answer(model, do_sample=True, seed=2)


class Int8Linear(torch.nn.Module):
    """A quantized linear layer, whose weight is no matrix to multiply by."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


def test_a_head_in_eight_bits_is_used_through_its_module(model: Any) -> None:
    """torchao itself: tests/release/test_clean_environment.py."""
    quantized = copy.deepcopy(model)
    quantized.lm_head = Int8Linear(quantized.lm_head)
    found = quantized.generate(PROMPT, max_new_tokens=12, eos_token_ids=())[0, LENGTH:].tolist()
    as_floats = copy.deepcopy(model)
    as_floats.lm_head = torch.nn.Linear(1, 1, bias=False)
    as_floats.lm_head.weight = torch.nn.Parameter(quantized.lm_head.weight.float() * quantized.lm_head.scale)
    assert found == as_floats.generate(PROMPT, max_new_tokens=12, eos_token_ids=())[0, LENGTH:].tolist()
