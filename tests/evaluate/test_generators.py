"""Generators: opened by model type, greedy and drawn, alone and in batches; what their cache holds."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron_tide.bridge import load_tokenizer
from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.evaluate.generators import (
    AutoregressiveGenerator,
    BlockDiffusionGenerator,
    Generator,
    ResponseCache,
    open_generator,
)
from megatron_tide.evaluate.thoughts import STILL_THINKING, cut, is_open, text_of
from megatron_tide.generate import complete
from tests.support.answering import write_autoregressive
from tests.support.lab import Lab, write_checkpoint
from tests.support.models import tiny_wedlm_config, write_hub_folder

PRESET = BenchmarkPreset(task="t", new_tokens=12, steps=6, chat_template=False)
PROMPTS = ["Print line 3.", "x", "Write a function that returns the largest number.", "for name in names:"]


@pytest.fixture(scope="module")
def baseline(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoregressive(tmp_path_factory.mktemp("ar") / "ar", lab.student)


def opened(path: Path, batch_size: int = 2, dtype: torch.dtype = torch.float32) -> Generator:
    return open_generator(str(path), dtype, "cpu", batch_size)


def requests(generator: Generator, prompts: list[str], preset: BenchmarkPreset = PRESET, **more: Any) -> list[Instance]:
    settings = {"until": [], "chat_template": preset.chat_template, **generator.settings(preset), **more}
    return [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]


def answers(generator: Any, prompts: list[str], preset: BenchmarkPreset = PRESET, **more: Any) -> list[str]:
    return generator.generate_until(requests(generator, prompts, preset, **more))


def test_each_model_type_has_its_generator(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    assert isinstance(opened(baseline), AutoregressiveGenerator)
    for path in (lab.student, lab.teacher, step, step.parent):
        assert isinstance(opened(path), BlockDiffusionGenerator)


def test_any_causal_model_of_transformers_generates(lab: Lab, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(lab.student)
    tokenizer.save(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(tmp_path)
    generator = opened(tmp_path)
    assert isinstance(generator, AutoregressiveGenerator)
    assert len(answers(generator, PROMPTS)) == 4


def test_a_shared_vocabulary_teacher_decodes_in_the_papers_blocks(lab: Lab, tmp_path: Path) -> None:
    """WeDLM's config names neither block nor mask."""
    load_tokenizer(lab.student).save(tmp_path)
    write_hub_folder(tmp_path, tiny_wedlm_config(vocab_size=320))
    generator = opened(tmp_path)
    assert generator.settings(PRESET)["block_size"] == 32
    ids = [generator.text_tokenizer.encode(PROMPTS[0])]
    options = {"max_new_tokens": 12, "steps": PRESET.steps, "block_size": 32, "block_layout": "answer"}
    (expected,) = complete(generator.model, generator.text_tokenizer, ids, **options)
    assert 1 <= len(expected.ids) <= 12
    assert answers(generator, PROMPTS[:1]) == [expected.text]


def test_blocks_are_those_of_the_model_and_passes_those_of_the_preset(lab: Lab) -> None:
    generator = opened(lab.student)
    assert generator.settings(PRESET) == {
        "block_size": generator.model.config.block_size,
        "block_layout": "answer",
        "max_new_tokens": 12,
        "steps": PRESET.steps,
        "temperature": 0.0,
    }
    ids = [generator.text_tokenizer.encode(prompt) for prompt in PROMPTS]
    rule: dict[str, Any] = {"max_new_tokens": 12, "tokens_per_step": 2}
    expected = complete(generator.model, generator.text_tokenizer, ids, **rule, block_layout="answer")
    assert answers(generator, PROMPTS) == [one.text for one in expected]
    in_sequence = complete(generator.model, generator.text_tokenizer, ids, **rule)
    assert answers(generator, PROMPTS, replace(PRESET, block_layout="sequence")) == [one.text for one in in_sequence]
    assert in_sequence != expected


def greedy(generator: Generator, prompt: Any, count: int) -> list[int]:
    """One token after the other, without cache, padding or batch; ``prompt``: text or ids."""
    start = generator.text_tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = [int(index) for index in start]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(generator.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == generator.text_tokenizer.eos_id:
            break
    return ids[len(start) :]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_autoregressive_answers_are_the_likeliest_tokens(baseline: Path, batch_size: int) -> None:
    """The checkpoint's own generation config would draw, from the top 20; the preset does not."""
    generator = opened(baseline, batch_size)
    found = answers(generator, PROMPTS)
    assert found == [generator.text_tokenizer.decode(greedy(generator, prompt, 12)) for prompt in PROMPTS]
    assert len(set(found)) > 1


def test_an_answer_ends_at_its_end_of_text(baseline: Path, tmp_path: Path) -> None:
    """Whatever token comes third is made the end of text by the config, as a list as well."""
    generator = opened(baseline)
    expected = greedy(generator, PROMPTS[0], 12)
    end = expected[2]
    folder = tmp_path / "ends"
    shutil.copytree(baseline, folder)
    values = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": [end, 5]}))
    found = answers(opened(folder), [PROMPTS[0], PROMPTS[2]])[0]
    assert found == generator.text_tokenizer.decode(expected[: expected.index(end) + 1])


@pytest.mark.parametrize("kind", ["student", "baseline"])
def test_answers_end_before_the_stop_strings_of_the_request(lab: Lab, baseline: Path, kind: str) -> None:
    generator = opened(lab.student if kind == "student" else baseline)
    whole = answers(generator, PROMPTS)
    stops = [text[len(text) // 2 :][:2] for text in whole]
    assert all(stops)
    expected = [cut(text, stops) for text in whole]
    assert expected != whole
    assert answers(generator, PROMPTS, until=stops) == expected


@pytest.mark.parametrize("kind", ["student", "baseline"])
def test_special_tokens_are_recognised_in_what_a_template_rendered(lab: Lab, baseline: Path, kind: str) -> None:
    """A plain prompt is all text."""
    generator = opened(lab.student if kind == "student" else baseline)
    tokenizer = generator.text_tokenizer
    rendered = generator.apply_chat_template([{"role": "user", "content": PROMPTS[0]}])
    special, plain = tokenizer.encode_prompt(rendered), tokenizer.encode(rendered)
    assert answer_to(generator, special) != answer_to(generator, plain)
    for chat_template, prompt, ids in ((True, rendered, special), (False, str(rendered), plain)):
        found = answers(generator, [prompt], replace(PRESET, chat_template=chat_template))
        assert found == [answer_to(generator, ids)]
    with pytest.raises(ValueError, match="changed its prompt after the chat template rendered it"):
        answers(generator, [str(rendered)], replace(PRESET, chat_template=True))


def answer_to(generator: Generator, ids: Any) -> str:
    """The answer to a prompt of these ids, in the plain way."""
    if isinstance(generator, AutoregressiveGenerator):
        return generator.text_tokenizer.decode(greedy(generator, ids, 12))
    rule: dict[str, Any] = {"max_new_tokens": 12, "steps": PRESET.steps, "block_layout": PRESET.block_layout}
    (found,) = complete(generator.model, generator.text_tokenizer, [ids], **rule)
    return found.text


@pytest.mark.parametrize("kind", ["student", "baseline"])
def test_drawn_answers_depend_on_seed_and_sample(lab: Lab, baseline: Path, kind: str) -> None:
    generator, drawn = opened(lab.student if kind == "student" else baseline), replace(PRESET, temperature=1.0)
    first = answers(generator, PROMPTS, drawn, seed=7, sample=0)
    assert answers(generator, PROMPTS, drawn, seed=7, sample=0) == first
    assert answers(generator, PROMPTS, drawn, seed=8, sample=0) != first
    assert answers(generator, PROMPTS, drawn, seed=7, sample=1) != first


def test_drawn_answers_of_a_block_model_do_not_depend_on_the_batch(lab: Lab) -> None:
    drawn = replace(PRESET, temperature=1.0)
    alone = answers(opened(lab.student, batch_size=1), PROMPTS, drawn, seed=7, sample=0)
    generator = opened(lab.student, batch_size=4)
    assert answers(generator, PROMPTS, drawn, seed=7, sample=0) == alone
    assert answers(generator, PROMPTS[2:], drawn, seed=7, sample=0) == alone[2:]


def test_draws_follow_the_softmax(baseline: Path) -> None:
    """Frequencies of the first token over many draws, against the probabilities at that temperature."""
    generator, drawn = opened(baseline, 400), replace(PRESET, new_tokens=1, steps=1, temperature=1.5)
    ids = generator.text_tokenizer.encode(PROMPTS[1])
    with torch.no_grad():
        probability = (generator.model(torch.tensor([ids.tolist()])).logits[0, -1] / 1.5).softmax(-1)
    likeliest, count = int(probability.argmax()), 400
    text = generator.text_tokenizer.decode([likeliest])
    found = answers(generator, PROMPTS[1:2] * count, drawn, seed=0, sample=0)
    same = [i for i in range(len(probability)) if generator.text_tokenizer.decode([i]) == text]
    expected = float(probability[same].sum())
    share = sum(answer == text for answer in found) / count
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_fingerprints_tell_models_apart(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    found = [opened(path).fingerprint for path in (lab.student, lab.student, step, baseline)]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert opened(lab.student, dtype=torch.bfloat16).fingerprint not in found
    other = shutil.copytree(lab.student, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": config["rope_theta"] / 2}))
    assert opened(other).fingerprint not in found


def test_cut() -> None:
    assert cut("one two three", ["three", " two"]) == "one"
    assert cut("one", ["", "two"]) == "one"


def test_stop_strings_in_thoughts_end_nothing() -> None:
    thought = "<think>\nQ: is it 4?\n\nNo.</think>\n\n5.\n\nQ: next"
    assert cut(thought, ["\n\n", "Q:"]) == "5."
    assert cut("still opened by the prompt\n\n</think>  x = 1\n\n", ["\n\n"]) == "  x = 1"
    assert cut("<think>\nwithout an end. The answer is 7.", []) == ""


TURN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
TURN += "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


def test_models_think_where_they_are_told_to(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    """Baselines do not think unless asked to; a student is prompted as it was trained."""
    for kind, start in (("ar", baseline), ("student", lab.student)):
        folder = shutil.copytree(start, tmp_path / kind)
        (folder / "chat_template.jinja").write_text(TURN)
        for thinking, expected in ((None, kind == "ar"), (False, True), (True, False)):
            generator = open_generator(str(folder), torch.float32, "cpu", 1, thinking)
            prompt = generator.apply_chat_template([{"role": "user", "content": "x"}])
            assert prompt == "[user] x\n[assistant] " + "<think>\n\n</think>\n\n" * expected


class Writes(torch.nn.Module):
    """In place of a model: each row's next token is that of ``ids`` that follows those written already."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        super().__init__()
        self.ids, self.vocabulary, self.passes = ids, vocabulary, 0

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        next_one = self.ids[min(self.passes, len(self.ids) - 1)]
        self.passes += 1
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., next_one] = 1.0
        return CausalLMOutputWithPast(logits=logits)


def writes(generator: Generator, text: str, monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Make an autoregressive generator write ``text``, whatever it is asked."""
    ids = [*generator.text_tokenizer.encode(text).tolist(), generator.text_tokenizer.eos_id]
    says = Writes(ids, generator.model.config.vocab_size)
    monkeypatch.setattr(generator.model, "forward", says.__call__)
    return says


LONG = BenchmarkPreset(task="t", new_tokens=100, steps=100, chat_template=True)
OPENED = TURN.replace("<think>\n\n</think>\n\n", "<think>\n")
THINKS = [
    ("<think> STOP </think>\n\n42 STOP no", "42", "x STOP</think>7 STOP", "7"),
    ("<think> STOP", "", "still thinking STOP", ""),
    ("<think>a</think><think> STOP and", "", "a</think>\n<think> STOP", ""),
    ("<think></think>4 <think> STOP", "4 <think>", "</think>4 STOP", "4"),
]


@pytest.mark.parametrize(("closed", "expected", "opened_by_prompt", "expected_then"), THINKS)
def test_a_baseline_stops_behind_its_thoughts_only(
    baseline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: str,
    expected: str,
    opened_by_prompt: str,
    expected_then: str,
) -> None:
    for name, template, text, answer in (
        ("closed", TURN, closed, expected),
        ("opened", OPENED, opened_by_prompt, expected_then),
    ):
        folder = shutil.copytree(baseline, tmp_path / name)
        (folder / "chat_template.jinja").write_text(template)
        generator = opened(folder, 1)
        prompt = generator.apply_chat_template([{"role": "user", "content": "x <think>"}])
        assert is_open(prompt) == (name == "opened")
        says = writes(generator, text, monkeypatch)
        (found,) = answers(generator, [prompt], LONG, until=[" STOP"])
        assert found == answer
        assert getattr(found, "notes", ()) == (() if answer else (STILL_THINKING,))
        assert (says.passes < len(says.ids)) == (answer != "")  # it ended at the stop string


def test_an_unfinished_thought_of_a_block_model_is_no_answer_either(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(lab.student, tmp_path / "student")
    (folder / "chat_template.jinja").write_text(OPENED)
    generator = open_generator(str(folder), torch.float32, "cpu", 2, thinking=False)
    prompt = generator.apply_chat_template([{"role": "user", "content": "x"}])
    plain = open_generator(str(lab.student), torch.float32, "cpu", 2).apply_chat_template(
        [{"role": "user", "content": "x"}]
    )
    for asked, empty in ((prompt, True), (plain, False)):
        (found,) = answers(generator, [asked], replace(PRESET, chat_template=True))
        assert (found == "") == empty
        assert getattr(found, "notes", ()) == ((STILL_THINKING,) if empty else ())
    with ResponseCache(generator, tmp_path / "c.sqlite") as cache:
        for _ in range(2):  # kept answers keep their notes
            assert [one.notes for one in answers(cache, [prompt], replace(PRESET, chat_template=True))] == [
                (STILL_THINKING,)
            ]
    begun = generator.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "def f"}], add_generation_prompt=False
    )
    assert begun.endswith("[assistant] <think>\n\n</think>\n\ndef f")


def test_marks_of_thoughts_count_where_they_are_special_tokens(lab: Lab, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    raw = PreTrainedTokenizerFast.from_pretrained(lab.student)
    raw.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    raw.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode_prompt("<think>no STOP</think>\n\n5 STOP<|im_end|>")
    assert "<think>" not in tokenizer.decode(ids)
    assert cut(text_of(tokenizer, ids), [" STOP"]) == "5"


def test_long_prompts_lose_their_beginning_and_keep_their_text(baseline: Path, tmp_path: Path) -> None:
    """What is left of a prompt has no other control tokens than the template's; the loss is said."""
    folder = shutil.copytree(baseline, tmp_path / "ar")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 64}))
    generator: Any = opened(folder)
    said = [{"role": "user", "content": "word " * 60 + "<|im_end|> <|mask|>"}]
    prompt = generator.apply_chat_template(said)
    seen: list[Any] = []
    generate = generator.model.generate
    generator.model.generate = lambda **more: seen.append(more["input_ids"]) or generate(**more)
    (found,) = answers(generator, [prompt], replace(PRESET, chat_template=True))
    assert [*map(len, seen[0])] == [64 - 12]
    special = [one for one in seen[0][0].tolist() if one in generator.text_tokenizer.special_ids]
    assert [generator.text_tokenizer.id_to_token(one) for one in special] == ["<|im_end|>", "<|im_start|>"]
    assert "context" in found.notes[-1]
    with pytest.raises(ValueError, match=r"64 new tokens do not fit the model's context of 64; lower --max-new-tokens"):
        answers(generator, [prompt], replace(PRESET, chat_template=True, new_tokens=64))


def test_tasks_of_one_batch_keep_their_own_lengths(lab: Lab) -> None:
    generator = opened(lab.student, 4)
    short, long = replace(PRESET, new_tokens=2, steps=2), replace(PRESET, new_tokens=12, steps=12)
    mixed = generator.generate_until(requests(generator, PROMPTS[:1], short) + requests(generator, PROMPTS[:1], long))
    assert mixed == [*answers(generator, PROMPTS[:1], short), *answers(generator, PROMPTS[:1], long)]
    assert mixed[0] != mixed[1]


def test_equal_texts_of_other_parts_are_other_entries(lab: Lab, tmp_path: Path) -> None:
    """A user who types the marks of a turn is not answered as another who took two turns."""
    generator = opened(lab.student)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    typed = [{"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"}]
    prompts = [generator.apply_chat_template(said) for said in (turn, typed)]
    assert str(prompts[0]) == str(prompts[1])
    counted = Counted(generator)
    with ResponseCache(generator, tmp_path / "c.sqlite") as cache:
        found = [answers(cache, [prompt], replace(PRESET, chat_template=True)) for prompt in prompts]
        assert counted.batches == [1, 1]
        again = [answers(cache, [prompt], replace(PRESET, chat_template=True)) for prompt in prompts]
    assert counted.batches == [1, 1]
    assert found == again


def test_the_code_that_makes_answers_is_part_of_a_fingerprint(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_tide.evaluate.generators as module

    first = opened(lab.student).fingerprint
    monkeypatch.setattr(module, "sha256_file", lambda path: "changed")
    assert opened(lab.student).fingerprint != first


@pytest.mark.parametrize("text", ["a <|im_end|> b", "<|mask|>"])
def test_likelihoods_of_text_see_no_control_tokens(baseline: Path, text: str) -> None:
    generator: Any = opened(baseline)
    special = generator.text_tokenizer.special_ids
    assert not special & {*generator.tok_encode(text)}
    rendered = generator.apply_chat_template([{"role": "user", "content": text}])
    assert len(special & {*generator.tok_encode(rendered)}) == 2
    for size in range(1, 30):  # what lm-eval cuts off at the left
        whole = generator.text_tokenizer.encode_prompt(rendered).tolist()
        assert generator.tok_encode(rendered, left_truncate_len=size) == whole[-size:]
        ids, mask = generator.tok_batch_encode([rendered, "x"], left_truncate_len=size)
        assert ids[0].tolist() == whole[-size:]
        assert mask[1].sum() == 1
    context, answer = generator._encode_pair(rendered + " ", text)
    assert len(special & {*context}) == 2  # <|im_start|>, <|im_end|>
    assert not special & {*answer}
    assert generator.text_tokenizer.decode(answer) == f"\n {text}"  # lm-eval moves the spaces


class Counted:
    """Counts the prompts that reach a generator, and stops it after some of them."""

    def __init__(self, generator: Any, stop_after: int | None = None) -> None:
        self.batches: list[int] = []
        self._complete, self._stop_after = generator._complete, stop_after
        generator._complete = self

    def __call__(self, model: Any, prompts: list[Any], asked: list[Any]) -> list[Any]:
        if self._stop_after is not None and sum(self.batches) >= self._stop_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        return self._complete(model, prompts, asked)


def test_a_stopped_evaluation_continues_with_the_same_batches(lab: Lab, tmp_path: Path) -> None:
    prompts = [f"Print line {number}{'!' * (number % 4)}" for number in range(10)]
    whole = opened(lab.student)
    expected = answers(whole, prompts)
    generator = opened(lab.student)
    Counted(generator, stop_after=4)
    with pytest.raises(KeyboardInterrupt), ResponseCache(generator, tmp_path / "c.sqlite") as cache:
        answers(cache, prompts)
    generator = opened(lab.student)
    counted = Counted(generator)
    with ResponseCache(generator, tmp_path / "c.sqlite") as cache:
        assert answers(cache, prompts) == expected
        assert counted.batches == [2, 2, 2]
        assert answers(cache, prompts) == expected
        assert counted.batches == [2, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stopped_evaluation_of_a_baseline_continues_too(baseline: Path, tmp_path: Path, temperature: float) -> None:
    """A batch is in the cache before the next one starts; what is drawn depends on the batch."""
    prompts = [f"Print line {number}{'!' * (number % 4)}" for number in range(10)]
    preset, drawn = replace(PRESET, temperature=temperature), {"seed": 7, "sample": 0} if temperature else {}
    expected, sizes = answers(opened(baseline), prompts, preset, **drawn), list[int]()
    for stop_after in (4, None):
        generator: Any = opened(baseline)
        complete = generator._complete

        def counted(one: Any, batch: Any, asked: Any, stop_after: Any = stop_after, complete: Any = complete) -> Any:
            if sum(sizes) == stop_after:
                raise KeyboardInterrupt
            sizes.append(len(batch))
            return complete(one, batch, asked)

        generator._complete = counted
        with contextlib.suppress(KeyboardInterrupt), ResponseCache(generator, tmp_path / "c.sqlite") as cache:
            found = answers(cache, prompts, preset, **drawn)
    assert sizes == [2] * 5
    assert found == expected


def test_other_settings_and_prompts_are_other_entries(lab: Lab, tmp_path: Path) -> None:
    generator = opened(lab.student)
    counted = Counted(generator)
    with ResponseCache(generator, tmp_path / "c.sqlite") as cache:
        answers(cache, PROMPTS[:1])
        for changes in ({"new_tokens": 13}, {"steps": 3}, {"temperature": 0.5}):
            answers(cache, PROMPTS[:1], replace(PRESET, **changes))
        answers(cache, PROMPTS[:1], replace(PRESET, temperature=0.5), seed=1)
        answers(cache, ["y"])
        assert counted.batches == [1] * 6


def test_a_cache_is_json_and_never_unpickled(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    generator = opened(lab.student)
    with ResponseCache(generator, path) as cache:
        found = answers(cache, PROMPTS[:1])
    with sqlite3.connect(path) as database:
        ((_, value),) = database.execute("select * from unnamed").fetchall()
        assert json.loads(value) == found[0]
        database.execute("update unnamed set value = ?", (pickle.dumps(found[0]),))
    with pytest.raises(ValueError, match=r"codec|JSON|Expecting"), ResponseCache(generator, path) as cache:
        answers(cache, PROMPTS[:1])
    path.write_bytes(b"no database at all, for certain" * 100)
    with pytest.raises(ValueError, match=r"c\.sqlite: not a response cache .*remove it"):
        ResponseCache(generator, path)


def test_mistakes(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="model_type 'clip' is neither a block diffusion model nor a causal model"):
        opened(other)
    broken = tmp_path / "broken"
    shutil.copytree(baseline, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken: cannot be read as a causal language model"):
        opened(broken)
    lacking = tmp_path / "lacking"
    shutil.copytree(baseline, lacking)
    values = json.loads((lacking / "config.json").read_text())
    kinds = values["layer_types"] + values["layer_types"][:1]
    (lacking / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3, "layer_types": kinds}))
    with pytest.raises(ValueError, match=r"lacking: its tensors are not those of the model .*layers\.2"):
        opened(lacking)
    with pytest.raises(ValueError, match="batch size 0"):
        opened(lab.student, batch_size=0)
    bare = shutil.copytree(baseline, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    load_tokenizer(lab.teacher).save(bare)
    with pytest.raises(ValueError, match=r"bare: a baseline needs a tokenizer\.json"):
        opened(bare)


def test_copies_of_a_model_share_the_batches(lab: Lab) -> None:
    """The answers of one, in their order; drawn ones too."""
    one = open_generator(str(lab.student), torch.float32, "cpu", 1)
    three = open_generator(str(lab.student), torch.float32, "cpu", 1, copies=("cpu", "cpu"))
    assert len({id(model) for model in (three.model, *three.copies)}) == 3
    for preset in (PRESET, replace(PRESET, temperature=0.8)):
        assert answers(three, PROMPTS, preset) == answers(one, PROMPTS, preset)
    ids = [one.text_tokenizer.encode(prompt) for prompt in PROMPTS]
    plainly = complete(one.model, one.text_tokenizer, ids, batch_size=1, max_new_tokens=6)
    assert complete(one.model, one.text_tokenizer, ids, batch_size=1, max_new_tokens=6, copies=three.copies) == plainly
