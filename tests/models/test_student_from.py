"""init-model --from: an existing model becomes a student's folder, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.data import PreparedData
from megatron_tide.files import TEMPORARY
from megatron_tide.models import load_model
from megatron_tide.models.student_from import kept_layers
from tests.support.ar_models import UNUSED, ar_folder, write_gguf
from tests.support.chain import Chain
from tests.support.commands import command
from tests.support.models import write_hub_folder

init_model = command("init-model")
TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ar_folder(tmp_path_factory.mktemp(request.param), request.param)


def make(source: Path, out: Path, *flags: str) -> Any:
    init_model(["--from", str(source), "--out", str(out), *flags])
    return load_model(out)


def test_an_unused_token_becomes_the_mask(source: Path, tmp_path: Path) -> None:
    student = make(source, tmp_path / "s", "--mask-token", UNUSED, "--block-size", "4")
    before, tokenizer = load_model(source, as_student=True), load_tokenizer(tmp_path / "s")
    old = load_tokenizer(source)
    assert student.config.model_type.startswith("a2d-")
    assert (student.config.block_size, student.config.mask_token_id) == (4, tokenizer.mask_id)
    assert tokenizer.id_to_token(tokenizer.mask_id) == UNUSED
    assert (student.config.eos_token_id, student.config.pad_token_id) == (old.eos_id, old.pad_id)
    assert tokenizer.vocab_size == old.vocab_size
    assert tokenizer.render(TALK) == old.render(TALK)
    expected = before.head_weight.detach().clone()
    expected[tokenizer.mask_id] = expected[: old.vocab_size].mean(0)
    assert torch.equal(student.head_weight, expected)
    assert student.head_weight is student.model.embed_tokens.weight
    for name, tensor in before.model.layers.named_parameters():
        assert torch.equal(student.model.layers.get_parameter(name), tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_new_mask_token_takes_a_free_row_or_grows_the_embeddings(source: Path, tmp_path: Path) -> None:
    old = load_tokenizer(source)
    before = load_model(source).config.vocab_size
    student = make(source, tmp_path / "s")
    assert before > old.vocab_size
    assert student.config.vocab_size == before
    tokenizer = load_tokenizer(tmp_path / "s")
    assert tokenizer.id_to_token(tokenizer.mask_id) == "<|mask|>"
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (old.vocab_size, old.vocab_size + 1)
    assert student.config.block_size == 32


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_where_no_row_is_free(tmp_path: Path, tied: bool) -> None:
    count = load_tokenizer(ar_folder(tmp_path / "probe", "llama")).vocab_size
    source = ar_folder(tmp_path / "source", "llama", vocab_size=count, tie_word_embeddings=tied)
    before, student = load_model(source), make(source, tmp_path / "s", "--mask-token", "<M>")
    assert student.config.vocab_size == -(-(count + 1) // 64) * 64
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before.get_parameter(name), student.get_parameter(name)
        assert torch.equal(new[:count], old)
        assert torch.equal(new[count], old.mean(0))
    assert (student.head_weight is student.model.embed_tokens.weight) == tied


def test_some_layers(source: Path, tmp_path: Path) -> None:
    before = load_model(source, as_student=True)
    student = make(source, tmp_path / "s", "--keep-layers", "1")
    assert student.config.num_hidden_layers == 1
    for name, tensor in before.model.layers[1].named_parameters():
        assert torch.equal(student.model.layers[0].get_parameter(name), tensor), name


def test_which_layers() -> None:
    assert kept_layers("2/3", 30) == [*range(10), *range(20, 30)]
    assert kept_layers("1/3", 7) == [0, 5, 6]
    assert kept_layers("1/2", 2) == [1]
    assert kept_layers("3/3", 4) == [0, 1, 2, 3]
    assert kept_layers("0,2,5", 6) == [0, 2, 5]
    assert kept_layers("0-2,4,6", 7) == [0, 1, 2, 4, 6]
    for text in (
        "every:2",
        "",
        "0/3",
        "4/3",
        "1/99",
        "2,1",
        "1,1",
        "0,7",
        "-1",
        "1/3/5",
        "2-1",
        "0-3,3",
        "0-9999",
        "1-",
    ):
        with pytest.raises(ValueError, match="--keep-layers"):
            kept_layers(text, 7)


def test_a_block_diffusion_model_keeps_its_mask_and_its_row(chain: Chain, tmp_path: Path) -> None:
    before, student = (
        load_model(chain.root / "student"),
        make(chain.root / "student", tmp_path / "s", "--keep-layers", "1/2"),
    )
    assert torch.equal(student.head_weight, before.head_weight)
    assert student.config.mask_token_id == before.config.mask_token_id
    assert student.config.block_size == before.config.block_size
    assert load_tokenizer(tmp_path / "s").fingerprint == load_tokenizer(chain.root / "student").fingerprint
    refuse(
        chain.root / "student", tmp_path / "t", "is not the mask that the model was trained with", "--mask-token", "<M>"
    )


def test_layers_of_different_kinds_do_not_take_each_others_place(chain: Chain, tmp_path: Path) -> None:
    make(chain.root / "teacher", tmp_path / "s", "--keep-layers", "0,2")
    refuse(chain.root / "teacher", tmp_path / "t", "layers of this model differ in kind", "--keep-layers", "1,2")


def test_precision_is_the_sources(tmp_path: Path) -> None:
    source = ar_folder(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "model.safetensors").unlink()
    write_hub_folder(source, config, dtype=torch.bfloat16)
    make(source, tmp_path / "s")
    assert json.loads((tmp_path / "s/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_training_data_can_be_prepared_with_it(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "s", "--block-size", "4")
    row = {"messages": [*TALK, {"role": "assistant", "content": "return 1\n"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--student", str(tmp_path / "s"), "--student-block", "4", "--student-length", "64", "--workers", "1"]
    command("prepare")(["--data", str(tmp_path / "rows.jsonl"), *flags, "--out", str(tmp_path / "d")])
    manifest = PreparedData.open(tmp_path / "d").manifest
    assert manifest["student"]["mask_id"] == load_tokenizer(tmp_path / "s").mask_id


def refuse(source: Path, out: Path, message: str, *flags: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(source, out, *flags)
    assert not out.exists()
    assert not list(out.parent.glob(f"{TEMPORARY}*"))


def test_mistakes_are_one_line(source: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source)
    text, end = str(int(tokenizer.encode("a")[0])), str(tokenizer.eos_id)
    for message, *flags in (
        ("is text, so it cannot be the mask", "--mask-token", text),
        ("ends responses", "--mask-token", end),
        ("is part of every prompt", "--mask-token", "<|im_start|>"),
        ("no token has id", "--mask-token", str(tokenizer.vocab_size + 1)),
        ("not one of 0 to", "--mask-token", "99999999999"),
        ("without spaces", "--mask-token", "<a mask>"),
        ("--seed needs --config", "--seed", "1"),
        ("--keep-layers", "--keep-layers", "3/3"),
    ):
        refuse(source, tmp_path / "out", message, *flags)
    same = shutil.copytree(source, tmp_path / "same")
    before = {path.name for path in same.iterdir()}
    with pytest.raises(ValueError, match="is the source itself"):
        make(same, same, "--fresh")
    assert {path.name for path in same.iterdir()} == before
    refuse(tmp_path / "none", tmp_path / "out", "no such folder")
    refuse(source, tmp_path / "out", "--as-is is for .gguf files", "--as-is")
    refuse(source, tmp_path / "out", "--block-size changes the model", "--as-is", "--block-size", "4")
    with pytest.raises(ValueError, match="--keep-layers needs --from"):
        init_model(["--config", "c.json", "--keep-layers", "1/2", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="missing --from, or all of --config, --tokenizer and --seed"):
        init_model(["--config", "c.json", "--out", str(tmp_path / "out")])


def test_a_gguf_file_is_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="NOT TESTED: gguf is not installed (requirements-real.txt)")
    source = ar_folder(tmp_path / "source", "llama")
    file = write_gguf(tmp_path / "model.gguf", source)
    for name, auto_map in (("tokenizer_config.json", {"AutoTokenizer": ["evil.E", "evil.E"]}), ("config.json", {})):
        foreign = {"auto_map": auto_map, "tokenizer_class": "E", "eos_token": "def"}  # what lies beside it is not read
        (tmp_path / name).write_text(json.dumps(foreign))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    student = make(file, tmp_path / "s", "--mask-token", UNUSED, "--block-size", "4")
    expected = make(source, tmp_path / "e", "--mask-token", UNUSED, "--block-size", "4")
    mask = expected.config.mask_token_id
    for name, tensor in expected.named_parameters():
        found = student.get_parameter(name)
        rows = torch.arange(len(tensor)) != mask  # its mean is of more ids: the file has no unused rows
        assert torch.equal(found[rows], tensor[rows]), name
    old, new = load_tokenizer(source), load_tokenizer(tmp_path / "s")
    text = "def add(left, right): return 12"
    assert new.encode(text).tolist() == old.encode(text).tolist()
    assert (new.eos_id, new.mask_id) == (old.eos_id, mask)
    assert "<|im_start|>user" in new.render(TALK)
    init_model(["--from", str(file), "--as-is", "--out", str(tmp_path / "a")])
    plain = load_model(tmp_path / "a")
    assert plain.config.model_type == "llama"
    assert all(torch.equal(plain.get_parameter(name), one) for name, one in load_model(source).named_parameters())
    assert load_tokenizer(tmp_path / "a").fingerprint == new.fingerprint


def list_of(file: Path, texts: list[str], count: int) -> Path:
    """A header with one list, said to be of ``count`` texts, in a file of 5 MB."""
    items = b"".join(struct.pack("<Q", len(text)) + text.encode() for text in texts)
    file.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, count) + items)
    os.truncate(file, 5 << 20)
    return file


def test_a_broken_gguf_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="NOT TESTED: gguf is not installed (requirements-real.txt)")
    source = ar_folder(tmp_path / "source", "llama")
    refuse(tmp_path / "none.gguf", tmp_path / "out", "no such file")
    (tmp_path / "text.gguf").write_text("not a model")
    refuse(tmp_path / "text.gguf", tmp_path / "out", "cannot be read")
    whole = write_gguf(tmp_path / "whole.gguf", source)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    refuse(cut, tmp_path / "out", "cannot be read")
    refuse(
        write_gguf(tmp_path / "less.gguf", source, drop="ffn_up"), tmp_path / "out", "is missing or has another shape"
    )
    many = ["a" * size for size in range(1000)]
    for texts, count, said in ((many, 1000, "longer texts"), ([], 1 << 22 | 1, "items in its lists")):
        refuse(list_of(tmp_path / "list.gguf", texts, count), tmp_path / "out", said)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 900}))
    lies = write_gguf(tmp_path / "lies.gguf", source, drop="blk")
    refuse(lies, tmp_path / "out", "too small for the shapes it states")
