"""A release in another format than the training's: SDAR, which serving engines read, out and in again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.models import load_model
from megatron_tide.models.families import FAMILIES, read_config
from megatron_tide.release import Options, convert
from tests.support.lab import BLOCK, Lab, moved, stored, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(lab, tmp_path_factory.mktemp("run"), start=lab.student, data=lab.data, distilled=True)


def test_engines_get_what_they_read(
    lab: Lab, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdar, mask = FAMILIES["sdar"], load_tokenizer(lab.student).mask_id
    monkeypatch.setitem(FAMILIES, "sdar", replace(sdar, release=replace(sdar.release, mask_id=mask)))
    out = tmp_path / "served"
    assert convert(checkpoint, out, Options(format="sdar"))["largest_logit_difference"] == 0.0

    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sdar", ["SDARForCausalLM"])
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sdar.SDARForCausalLM"
    start = json.loads((lab.student / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (start["rope_theta"], None)
    assert (config["tie_word_embeddings"], start["tie_word_embeddings"]) == (False, True)
    assert (config["mask_token_id"], config["block_size"]) == (mask, BLOCK)
    assert "rope_parameters" not in config
    tensors, expected = stored(out), moved(lab.student, seed=1)
    assert set(tensors) == {*expected, "lm_head.weight"}
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    card = (out / "README.md").read_text()
    for line in (f"`block_size: {BLOCK}`", f"dllm_block_length={BLOCK}", f"mask_token_id={mask}", "threshold: 0.95"):
        assert line in card
    assert "{" not in card.partition("## How to serve")[2].partition("```python")[0]

    teacher, student = load_model(out), load_model(out, as_student=True)
    assert [type(model).__name__ for model in (teacher, student)] == ["SDARForCausalLM", "A2DQwen3LMHeadModel"]
    assert teacher.config.rope_theta == start["rope_theta"]
    assert torch.equal(teacher(torch.arange(9)[None]).logits, student(torch.arange(9)[None]).logits)
    assert read_config(out, as_student=True)[1].mask_token_id == mask


def test_what_engines_cannot_read_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    for name, line in (("sdar", "only 151669 as the mask, and this model's is"), ("llama", "as a2d-qwen3 or sdar")):
        with pytest.raises(ValueError, match=f"--format {name}: .*{line}") as refused:
            convert(checkpoint, tmp_path / "out", Options(format=name))
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()
