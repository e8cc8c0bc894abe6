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
    cut,
    open_generator,
)
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
    """A block model takes them as text in a plain prompt; lm-eval's own model recognises them there too."""
    generator = opened(lab.student if kind == "student" else baseline)
    tokenizer = generator.text_tokenizer
    rendered = generator.apply_chat_template([{"role": "user", "content": PROMPTS[0]}])
    special, plain = tokenizer.encode_prompt(rendered), tokenizer.encode(rendered)
    assert answer_to(generator, special) != answer_to(generator, plain)
    for chat_template, ids in ((True, special), (False, plain if kind == "student" else special)):
        found = answers(generator, [rendered], replace(PRESET, chat_template=chat_template))
        assert found == [answer_to(generator, ids)]


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


def test_a_baseline_stops_behind_its_thoughts_only(
    baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens, read as text with thoughts around the stop string."""
    folder = shutil.copytree(baseline, tmp_path / "ar")
    (folder / "chat_template.jinja").write_text(TURN)
    generator = opened(folder)
    plain = type(generator.raw if hasattr(generator, "raw") else generator.tokenizer).decode
    monkeypatch.setattr(
        type(generator.tokenizer), "decode", lambda *a, **k: f"<think>{plain(*a, **k)} STOP</think>\n\n42 STOP no"
    )
    assert answers(generator, PROMPTS[:1], until=[" STOP"]) == ["42"]


class Counted:
    """Counts the prompts that reach a generator, and stops it after some of them."""

    def __init__(self, generator: Any, stop_after: int | None = None) -> None:
        self.batches: list[int] = []
        self._complete, self._stop_after = generator._complete, stop_after
        generator._complete = self

    def __call__(self, prompts: list[Any], asked: list[Any]) -> list[str]:
        if self._stop_after is not None and sum(self.batches) >= self._stop_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        return self._complete(prompts, asked)


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
    """lm-eval's own model caches a batch before the next one starts; what is drawn depends on the batch."""
    prompts = [f"Print line {number}{'!' * (number % 4)}" for number in range(10)]
    preset, drawn = replace(PRESET, temperature=temperature), {"seed": 7, "sample": 0} if temperature else {}
    expected, sizes = answers(opened(baseline), prompts, preset, **drawn), list[int]()
    for stop_after in (4, None):
        generator: Any = opened(baseline)
        generate = generator._model_generate

        def counted(
            context: Any, *rest: Any, stop_after: Any = stop_after, generate: Any = generate, **more: Any
        ) -> Any:
            if sum(sizes) == stop_after:
                raise KeyboardInterrupt
            sizes.append(len(context))
            return generate(context, **more)

        generator._model_generate = counted
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
