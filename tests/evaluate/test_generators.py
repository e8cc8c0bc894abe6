"""Generators: opened by model type, greedy and drawn, alone and in batches; what their cache holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.chat import Rendered
from megatron_tide.evaluate.generators import (
    CHANGED,
    AutoregressiveGenerator,
    BlockDiffusionGenerator,
    Generator,
    open_generator,
)
from megatron_tide.evaluate.thoughts import cut
from megatron_tide.generate import complete
from tests.evaluate.generating import PRESET, PROMPTS, answers, opened, requests
from tests.support.lab import Lab, write_checkpoint
from tests.support.models import tiny_wedlm_config, write_hub_folder


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
    assert answers(generator, PROMPTS, drawn, seed=7, sample=0, repeat=1) != first


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


def test_text_that_the_tokenizer_changes_is_told_with_the_answers(lab: Lab, tmp_path: Path) -> None:
    folder = shutil.copytree(lab.student, tmp_path / "lower")
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": {"type": "Lowercase"}}))
    texts = ["add two", "add Two"]
    for path, expected in ((folder, [False, True]), (lab.student, [False, False])):
        generator = opened(path)
        talks = [generator.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
        for prompts, chat in ((texts, False), (talks, True)):
            found: list[Any] = answers(generator, prompts, replace(PRESET, chat_template=chat))
            assert [CHANGED in one.notes for one in found] == expected


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
    ends = shutil.copytree(lab.student, tmp_path / "ends")
    settings = json.loads((ends / "tokenizer_config.json").read_text())
    (ends / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": settings["pad_token"]}))
    assert opened(ends).fingerprint not in found
    blocks = opened(lab.student)
    blocks.model.config.block_size = 3  # as of a checkpoint, whose data say it
    assert blocks.fingerprint not in found
    begins: Any = opened(baseline)
    begins.tokenizer.bos_token = begins.tokenizer.pad_token  # before a text of which the likelihood is asked
    assert begins.fingerprint not in found
    shorter = opened(baseline)
    shorter._max_length = 7  # type: ignore[attr-defined] # of which some configurations say nothing, and tokenizers do
    assert shorter.fingerprint not in found


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


def test_the_code_that_makes_answers_is_part_of_a_fingerprint(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_tide.generate.identity as module

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


def test_mistakes(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for kind in ("clip", "bert"):  # an encoder has a causal class, which its weights fit
        (other / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=f"model_type '{kind}' is neither a block diffusion model nor a causal"):
            opened(other)
    broken = tmp_path / "broken"
    shutil.copytree(baseline, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.*: cannot be read"):
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


def test_a_models_own_layout_of_blocks_comes_before_the_presets(lab: Lab, tmp_path: Path) -> None:
    """LLaDA2 counts blocks from the start of the text in its published generation; a flag comes before both."""
    assert opened(lab.teacher).settings(PRESET)["block_layout"] == "sequence" != PRESET.block_layout
    given = open_generator(str(lab.teacher), torch.float32, "cpu", 2, block_layout="answer")
    assert given.settings(PRESET)["block_layout"] == "answer"
    assert opened(lab.student).settings(PRESET)["block_layout"] == "answer"
    stating = Path(shutil.copytree(lab.student, tmp_path / "stating"))
    (stating / "generation_config.json").write_text(json.dumps({"block_layout": "sequence"}))
    generator = opened(stating)
    assert generator.settings(PRESET)["block_layout"] == "sequence"
    ids = [generator.text_tokenizer.encode(prompt) for prompt in PROMPTS]
    rule: dict[str, Any] = {"max_new_tokens": 12, "tokens_per_step": 2, "block_layout": "sequence"}
    found = complete(generator.model, generator.text_tokenizer, ids, **rule)
    assert answers(generator, PROMPTS) == [one.text for one in found]
    (stating / "generation_config.json").write_text(json.dumps({"block_layout": "diagonal"}))
    with pytest.raises(ValueError, match="block_layout is 'diagonal'; use sequence or answer"):
        opened(stating)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_copies_of_a_baseline_write_what_one_writes(baseline: Path, temperature: float) -> None:
    """They share the batches; drawing takes turns."""
    preset = replace(PRESET, temperature=temperature)
    drawn = {"seed": 7, "sample": 0} if temperature else {}
    shared: Any = open_generator(str(baseline), torch.float32, "cpu", 1, copies=["cpu"])
    complete, used = shared._complete, set[int]()
    shared._complete = lambda model, *asked: used.add(id(model)) or complete(model, *asked)
    assert answers(shared, PROMPTS, preset, **drawn) == answers(opened(baseline, 1), PROMPTS, preset, **drawn)
    assert used == {id(shared.model), id(shared.copies[0])}


def test_a_prompt_begins_as_its_tokenizer_begins_texts_once(baseline: Path, tmp_path: Path) -> None:
    """Not with the end that some write behind a text, and not twice where the chat template writes it, too."""
    from tokenizers import processors

    generator: Any = opened(baseline)
    ids = {
        token: generator.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|mask|>", "<|im_end|>")
    }
    around = processors.TemplateProcessing(single="<|mask|> <|im_start|> $A <|im_end|>", special_tokens=[*ids.items()])
    generator.tokenizer.backend_tokenizer.post_processor = around
    text, encode = "a text", generator.text_tokenizer.encode
    before = [ids["<|mask|>"], ids["<|im_start|>"]]
    assert generator.encode(text, {"chat_template": False}).tolist() == [*before, *encode(text)]
    rendered = Rendered(f"<|mask|><|im_start|>{text}")
    assert generator.encode(rendered, {"chat_template": True}).tolist() == [*before, *encode(text)]
