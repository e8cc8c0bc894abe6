"""Models that answer: opened by type, greedy and drawn, alone and in batches."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.evaluate.answerers import (
    Answerer,
    AutoregressiveAnswerer,
    BlockAnswerer,
    check_has_bound,
    model_fingerprint,
    open_answerer,
)
from megatron_tide.evaluate.presets import Preset
from megatron_tide.generate import complete
from megatron_tide.release import open_model
from tests.support.answering import write_autoregressive
from tests.support.lab import Lab, write_checkpoint
from tests.support.models import tiny_wedlm_config, write_hub_folder

PRESET = Preset(task="t", new_tokens=12, steps=6)


@pytest.fixture(scope="module")
def baseline(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoregressive(tmp_path_factory.mktemp("ar") / "ar", lab.student)


def opened(path: Path) -> Answerer:
    return open_answerer(str(path), torch.float32, "cpu", open_model)


def prompts(answerer: Answerer) -> list[np.ndarray]:
    texts = ["Print line 3.", "x", "Write a function that returns the largest number.", "for name in names:"]
    return [answerer.tokenizer.encode(text) for text in texts]


def test_each_type_has_its_answerer(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    assert isinstance(opened(baseline), AutoregressiveAnswerer)
    for path in (lab.student, lab.teacher, step, step.parent):
        assert isinstance(opened(path), BlockAnswerer)


def test_a_shared_vocabulary_teacher_decodes_in_the_papers_blocks(lab: Lab, tmp_path: Path) -> None:
    """WeDLM's config names neither block nor mask."""
    load_tokenizer(lab.student).save(tmp_path)
    write_hub_folder(tmp_path, tiny_wedlm_config(vocab_size=320))
    answerer = opened(tmp_path)
    assert answerer.settings(PRESET)["block_size"] == 32
    (answer,) = answerer.answer(prompts(answerer)[:1], PRESET, seed=0, batch_size=1)
    assert 1 <= answer.tokens <= 12


def test_blocks_are_those_of_the_model_and_passes_those_of_the_preset(lab: Lab) -> None:
    answerer = opened(lab.student)
    assert answerer.settings(PRESET) == {
        "decoder": "block diffusion",
        "block_size": answerer.model.config.block_size,
        "max_new_tokens": 12,
        "steps": PRESET.steps,
        "temperature": 0.0,
    }
    expected = complete(
        answerer.model, answerer.tokenizer, prompts(answerer), max_new_tokens=12, tokens_per_step=2, seed=3
    )
    found = answerer.answer(prompts(answerer), PRESET, seed=3, batch_size=2)
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.tokens for one in found] == [len(one.ids) for one in expected]


def greedy(answerer: Answerer, prompt: np.ndarray, count: int) -> list[int]:
    """One token after the other, without cache, padding or batch."""
    ids = [int(index) for index in prompt]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(answerer.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == answerer.tokenizer.eos_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_autoregressive_answers_are_the_likeliest_tokens(baseline: Path, batch_size: int) -> None:
    """The checkpoint's own generation config would draw, from the top 20; the preset does not."""
    answerer = opened(baseline)
    found = answerer.answer(prompts(answerer), PRESET, seed=0, batch_size=batch_size)
    for prompt, answer in zip(prompts(answerer), found):
        expected = greedy(answerer, prompt, 12)
        assert answer.text == answerer.tokenizer.decode(expected)
        assert answer.tokens == len(expected)
    assert len({answer.text for answer in found}) > 1


def test_an_answer_ends_at_its_end_of_text(baseline: Path, tmp_path: Path) -> None:
    """Whatever token comes third is made the end of text by the config, as a list as well."""
    answerer = opened(baseline)
    prompt = prompts(answerer)[0]
    expected = greedy(answerer, prompt, 12)
    end = expected[2]
    folder = tmp_path / "ends"
    shutil.copytree(baseline, folder)
    values = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": [end, 5]}))
    (answer, _) = opened(folder).answer([prompt, prompts(answerer)[2]], PRESET, seed=0, batch_size=2)
    assert answer.finished
    assert answer.tokens == expected.index(end) + 1


def test_drawn_answers_depend_on_seed_and_place_not_on_the_batch(baseline: Path) -> None:
    answerer, drawn = opened(baseline), replace(PRESET, temperature=1.0)
    asked = prompts(answerer)
    alone = answerer.answer(asked, drawn, seed=7, batch_size=1)
    assert answerer.answer(asked, drawn, seed=7, batch_size=4) == alone
    assert answerer.answer(asked[2:], drawn, seed=9, batch_size=2) == alone[2:]
    assert answerer.answer(asked, drawn, seed=8, batch_size=4) != alone


def test_draws_follow_the_softmax(baseline: Path) -> None:
    """Frequencies of the first token over many seeds, against the probabilities at that temperature."""
    answerer, drawn = opened(baseline), replace(PRESET, new_tokens=1, steps=1, temperature=1.5)
    prompt = prompts(answerer)[1]
    with torch.no_grad():
        probability = (answerer.model(torch.tensor([prompt.tolist()])).logits[0, -1] / 1.5).softmax(-1)
    likeliest, count = int(probability.argmax()), 400
    found = answerer.answer([prompt] * count, drawn, seed=0, batch_size=100)
    share = sum(answer.text == answerer.tokenizer.decode([likeliest]) for answer in found) / count
    same = [
        i for i in range(len(probability)) if answerer.tokenizer.decode([i]) == answerer.tokenizer.decode([likeliest])
    ]
    expected = float(probability[same].sum())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_fingerprints_tell_models_apart(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    found = [model_fingerprint(opened(path)) for path in (lab.student, lab.student, step, baseline)]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    half = model_fingerprint(open_answerer(str(lab.student), torch.bfloat16, "cpu", open_model))
    assert half not in found


def test_mistakes(lab: Lab, baseline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama' cannot be asked; known are a2d-qwen3"):
        opened(other)
    broken = tmp_path / "broken"
    shutil.copytree(baseline, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken: cannot be read as a Qwen3 model"):
        opened(broken)
    lacking = tmp_path / "lacking"
    shutil.copytree(baseline, lacking)
    values = json.loads((lacking / "config.json").read_text())
    kinds = values["layer_types"] + values["layer_types"][:1]
    (lacking / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3, "layer_types": kinds}))
    with pytest.raises(ValueError, match=r"lacking: its tensors are not those of the Qwen3 .*layers\.2"):
        opened(lacking)
    with pytest.raises(ValueError, match="has no diffusion bound"):
        check_has_bound(baseline)
    check_has_bound(lab.student)
