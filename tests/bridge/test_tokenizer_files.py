"""Odd content in a tokenizer's JSON files is one line, before a library takes it at its word."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.bridge import load_tokenizer, tokenizer_files
from megatron_tide.bridge.tiktoken import QWEN_PATTERN

BIG = "x" * 1_000_000
FLAGS = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
IDS = [4_000_000_000, -1, 1.5, "1", True, None]
DECODERS: list[Any] = [1, "s", [], [1], {"a": 1}, {"1": 2}, {"5": [1]}, {"5": None}, {"5": {}}, {"5": {"content": BIG}}]
DECODERS += [{"5": {"content": one}} for one in (3, None, "", ["a"])]
DECODERS += [{str(one): {"content": "a"}} for one in (*IDS[:3], "x", "\u0661", "1" * 5000)]
ADDED: list[Any] = [1, "s", {}, {"5": {"content": "a"}}, [None], [[1, 2]], [{}], [{"id": 1}], [{"content": "a"}]]
ADDED += [[{"id": one, "content": "a", **FLAGS}] for one in IDS]
ADDED += [[{"id": 450, "content": one, **FLAGS}] for one in (BIG, "", 3, None, ["a"])]
ROLES: list[Any] = [1, True, [], ["a"], {}, {"content": 1}, {"content": BIG}, BIG, ""]
LISTS: list[Any] = [1, True, "s", [1], [None], [{}], [BIG], {"a": 1}, {"a": BIG}, {"content": 1}]
REPLACE = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 9}
EMPTY = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "e"}
STEPS: list[Any] = [{"type": "Prepend", "prepend": BIG}, {**REPLACE, "content": BIG}]
STEPS += [{"type": "Sequence", "normalizers": [one] * 9} for one in (REPLACE, EMPTY)]
TEMPLATES: list[Any] = [1, True, [1], ["a"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"default": 1}]
CLASSES: list[Any] = [
    "Qwen3ForCausalLM",
    "AutoModel",
    "models",
    "Evil",
    "evil/repo--tokenization.EvilTokenizer",
    "",
    1,
    [],
]
WHOLE = ["[]", "null", "1", '"s"', "{", "", "[[1]]", "[" * 100_000, "\xff"]


def cases(kind: str) -> Iterator[tuple[str, str, Any]]:
    """(file, key, value)"""
    config, roles = tokenizer_files.CONFIG, "special_tokens_map.json"
    yield from ((config, "added_tokens_decoder", value) for value in DECODERS)
    yield from (
        (file, key, value) for file in (config, roles) for key in ("mask_token", "eos_token") for value in ROLES
    )
    yield from ((file, "additional_special_tokens", value) for file in (config, roles) for value in LISTS)
    yield from ((config, "chat_template", value) for value in TEMPLATES)
    yield from ((config, "fast_tokenizer_files", value) for value in (1, ["tokenizer.4.0.0.json"], [None]))
    yield from (("added_tokens.json", "a", value) for value in IDS)
    yield from ((config, "tokenizer_class", value) for value in CLASSES)
    yield from ((file, "", text) for file in (config, roles, "added_tokens.json") for text in WHOLE)
    if kind == "student":
        yield from (("config.json", "tokenizer_class", value) for value in CLASSES)
        yield from (("tokenizer.json", "added_tokens", value) for value in ADDED)
        yield from (("tokenizer.json", "", text) for text in WHOLE)
        yield from (("tokenizer.json", part, step) for part in ("normalizer", "decoder") for step in STEPS)
        yield ("tokenizer.json", "model", {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": BIG})


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_odd_content_is_one_line_that_names_the_file(folders: Mapping[str, Path], tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "odd")
    for name, key, value in cases(kind):
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        content = json.loads(before) if before and key else {}
        path.write_text(json.dumps({**content, key: value}) if key else value, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{path}: ") as error:
            load_tokenizer(folder)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400
        path.unlink() if before is None else path.write_bytes(before)
    load_tokenizer(folder)


@pytest.mark.timeout(60)
def test_templates_in_a_folder_of_their_own_are_not_the_default_and_not_waited_for(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["student"], tmp_path / "more"))
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).template_fingerprint == load_tokenizer(folders["student"]).template_fingerprint
    (more / "default.jinja").write_text("{{ messages }}")  # a release would not have it
    with pytest.raises(ValueError, match=r"default\.jinja: move it to .*chat_template\.jinja"):
        load_tokenizer(folder)
    (more / "default.jinja").unlink()
    os.mkfifo(more / "tools.jinja")
    with pytest.raises(ValueError, match=r"tools\.jinja: not a regular file"):
        load_tokenizer(folder)


def test_files_larger_than_any_tokenizer_are_not_read(
    folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders["student"], tmp_path / "large")
    monkeypatch.setattr(tokenizer_files, "LARGEST", 100)
    with pytest.raises(ValueError, match=r"tokenizer\.json: has \d+ bytes, more than 100"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"added_tokens": value} for value in (1, "s", {}, [1], [None], [""], [BIG])),
        *(
            {key: value}
            for key in ("eos_token", "chat_template", "pattern", "normalizer")
            for value in (1, [], {}, True)
        ),
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_odd_settings_of_a_tiktoken_file_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    ranks = b"".join(base64.b64encode(bytes([one])) + b" %d\n" % one for one in range(256))
    (tmp_path / "a.tiktoken").write_bytes(ranks)
    settings = {"pattern": QWEN_PATTERN, "eos_token": "<|end|>", "added_tokens": ["<|end|>"]}
    (tmp_path / "a.tiktoken.json").write_text(json.dumps(settings))
    load_tokenizer(tmp_path)
    (tmp_path / "a.tiktoken.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=r"a\.tiktoken\.json: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_sizes_that_add_up_are_one_line(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["student"], tmp_path / "a"))
    (folder / "chat_template.jinja").write_text("x" * 2_000_000)
    with pytest.raises(ValueError, match="its chat template has more than 1048576 characters"):
        load_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 4000}] * 100}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer has texts of \d+ characters"):
        load_tokenizer(folder)
    folder = Path(shutil.copytree(folders["teacher"], tmp_path / "b"))
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.model: empty; restore the file"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja", "merges.txt"])
def test_texts_too_large_for_what_they_are_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with (tmp_path / name).open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(ValueError, match=f"{name}: has 53687091200 bytes, more than"):
        tokenizer_files.check_files(tmp_path)
