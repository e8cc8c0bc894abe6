"""What of a start's tokenizer goes out: its keys and forms on a list, no code, path or secret at any depth."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.release import Options, convert
from megatron_tide.release.tokenizer_config import clean_tokenizer_files
from tests.release.conftest import assert_refused
from tests.support.lab import Lab, write_checkpoint

FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
EVIL = {"auto_map": "Evil", "path": "/home/someone"}
FOREIGN: dict[str, Any] = {
    "added_tokens_decoder": {"316": {"content": "<|endoftext|>", **FLAGS, **EVIL}},
    "additional_special_tokens": ["<|im_end|>", {"content": "<|im_end|>", **EVIL}, "hf_secret", 1],
    "extra_special_tokens": {"image_token": "<|im_end|>", "/home/someone": "<|im_end|>", "x_token": "hf_secret"},
    "model_specific_special_tokens": {"x_token": "hf_secret"},
    "auth_token": {"content": "hf_secret"},
    "hf_token": "hf_secret",
    "image_token": "<|im_end|>",
    "auto_map": {"AutoTokenizer": ["t.Evil", None]},
    "backend": "/home/someone",
    "chat_template": [{"name": "default", "template": "{{ messages }}", **EVIL}, {"name": "rag", "template": "Evil"}],
    "errors": "/home/someone",
    "is_local": "/home/someone",
    "legacy": EVIL,
    "model_max_length": "/home/someone",
    "padding_side": "left",
    "sp_model_kwargs": {"model_file": "/home/someone"},
    "tokenizer_class": "../evil.EvilTokenizer",
    "eos_token": {"content": "<|im_end|>", **EVIL},
    "bos_token": None,
}
KEPT = {
    "added_tokens_decoder": {"316": {"content": "<|endoftext|>", **FLAGS}},
    "additional_special_tokens": ["<|im_end|>", {"content": "<|im_end|>"}],
    "extra_special_tokens": {"image_token": "<|im_end|>"},
    "model_specific_special_tokens": {},
    "image_token": "<|im_end|>",
    "chat_template": "{{ messages }}",
    "padding_side": "left",
    "eos_token": {"content": "<|im_end|>"},
    "bos_token": None,
}


def test_only_what_is_of_its_form_goes_out(lab: Lab, tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text(json.dumps(FOREIGN))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 318, "hf_secret": 317}))
    clean_tokenizer_files(tmp_path, load_tokenizer(lab.student), 512)
    read = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert read["special_tokens_map.json"] == KEPT
    assert read["tokenizer_config.json"] == KEPT | {
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
    }
    assert read["added_tokens.json"] == {"<|im_end|>": 318}


def test_a_class_that_needs_the_starts_code_is_the_plain_one(lab: Lab, tmp_path: Path) -> None:
    base = shutil.copytree(lab.student, tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "EvilTokenizer"}))
    load_tokenizer(base).save(tmp_path / "out")
    clean_tokenizer_files(tmp_path / "out", load_tokenizer(base), None)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.usefixtures("no_gate")
def test_what_no_loader_reads_beside_tokenizer_json_is_not_released(lab: Lab, tmp_path: Path) -> None:
    base = shutil.copytree(lab.student, tmp_path / "base")
    for name in ("merges.txt", "tokenizer.model"):
        (base / name).write_text("notes in /home/someone")
    for name in ("vocab.json", "chat_template.json"):
        (base / name).write_text(json.dumps({"somebody's notes": 1}))
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=base, data=lab.data)
    convert(checkpoint, tmp_path / "out", Options(dtype="float32"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"merges.txt", "tokenizer.model", "vocab.json", "chat_template.json"}


@pytest.mark.usefixtures("no_gate")
def test_a_template_that_a_release_would_lose_stops_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers finds one in a folder of its own, it is refused before; this is for what nobody thought of."""
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    module = sys.modules["megatron_tide.release.convert"]  # the package has a function of that name
    monkeypatch.setattr(module, "clean_tokenizer_files", lambda out, *_: (out / "chat_template.jinja").unlink())
    assert_refused(checkpoint, tmp_path / "out", "save_pretrained", skip_parity=True)


@pytest.mark.usefixtures("no_gate")
def test_values_of_the_configuration_are_numbers_and_words(lab: Lab, tmp_path: Path) -> None:
    """Below the keys on the list, too."""
    rope = {"rope_type": "linear", "factor": 2.0}
    odd = {"max_window_layers": EVIL, "router_dtype": "/home/someone", "score_function": "sigmoid", "norm_head": [EVIL]}
    changes = {
        "student": ({"rope_scaling": rope | EVIL}, lab.data, {"rope_scaling": {**rope, "rope_theta": 1e6}}),
        "teacher": (odd, lab.teacher_data, {"score_function": "sigmoid"}),
    }
    for side, (change, data, expected) in changes.items():
        base = shutil.copytree(getattr(lab, side), tmp_path / side)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | change))
        checkpoint = write_checkpoint(lab, tmp_path / f"{side}-run", start=base, data=data)
        convert(checkpoint, tmp_path / f"{side}-out", Options(dtype="float32"))
        text = (tmp_path / f"{side}-out" / "config.json").read_text()
        assert "Evil" not in text
        assert "/home" not in text
        assert json.loads(text).items() >= expected.items()
