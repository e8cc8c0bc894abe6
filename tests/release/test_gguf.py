"""A release as a GGUF file: its weights, settings and tokenizer come back; what llama.cpp cannot run is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tide import cli
from megatron_tide.bridge import load_tokenizer
from megatron_tide.gguf_header import read_header
from megatron_tide.models.families import read_config
from megatron_tide.models.gguf_release import read_release, tensor_name
from tests.support.ar_models import ar_folder
from tests.support.commands import command
from tests.support.gguf_models import gguf_release
from tests.support.lab import stored
from tests.support.models import tiny_llama_config, write_hub_folder
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece

gguf = pytest.importorskip("gguf", reason="NOT TESTED: gguf is not installed (requirements-gguf.txt)")
convert = command("convert-gguf")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_release(tmp_path_factory.mktemp("release"))


def written(release: Path, out: Path, kind: str) -> Any:
    convert([str(release), str(out), "--type", kind])
    return gguf.GGUFReader(out)


def tensors_of(reader: Any) -> dict[str, np.ndarray]:
    """fp32, in the shapes of torch."""
    return {one.name: gguf.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1]) for one in reader.tensors}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_fp32_and_bf16_are_those_of_the_release(tmp_path: Path, tied: bool) -> None:
    for kind, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        folder = gguf_release(tmp_path / kind, dtype, tie_word_embeddings=tied)
        found, expected = tensors_of(written(folder, tmp_path / f"{kind}.gguf", kind)), stored(folder)
        assert set(found) == {tensor_name(key) for key in expected}
        for key, tensor in expected.items():
            assert np.array_equal(found[tensor_name(key)], tensor.float().numpy()), key


def test_quantized_weights_are_near_and_the_embeddings_keep_more_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = gguf_release(tmp_path / "release", intermediate_size=48), {}
    expected = {tensor_name(key): tensor for key, tensor in stored(folder).items()}
    for kind, step in (("q8_0", 127), ("q4_0", 8)):
        reader = written(folder, tmp_path / f"{kind}.gguf", kind)
        types = {one.name: one.tensor_type.name for one in reader.tensors}
        assert types["token_embd.weight"] == "Q8_0"
        assert types["blk.0.attn_q.weight"] == kind.upper()
        assert types["blk.0.attn_q_norm.weight"] == "F32"
        assert types["blk.1.ffn_down.weight"] == "BF16"  # rows of 48
        assert "2 matrices with rows of no multiple of 32 stay in BF16" in capsys.readouterr().out
        for name, found in tensors_of(reader).items():
            most = float(expected[name].abs().max())
            assert np.abs(found - expected[name].numpy()).max() <= most / step, name


def test_settings_and_tokenizer_come_back(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    reader = written(release, out, "q8_0")
    config, header = read_release(out)
    expected = read_config(release)[1]
    for name in (
        "hidden_size",
        "head_dim",
        "block_size",
        "mask_token_id",
        "eos_token_id",
        "pad_token_id",
        "vocab_size",
    ):
        assert getattr(config, name) == getattr(expected, name), name
    assert config.rope_parameters["rope_theta"] == expected.rope_parameters["rope_theta"]
    assert header.values["megatron_tide.block_layout"] == "sequence"
    ours, theirs = load_tokenizer(out), load_tokenizer(release)
    for name in ("fingerprint", "template_fingerprint", "mask_id", "eos_id", "pad_id", "special_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    talk = [{"role": "user", "content": "add <|im_end|> 世界"}]  # a control token that is text
    assert ours.encode_prompt(ours.render(talk)).tolist() == theirs.encode_prompt(theirs.render(talk)).tolist()

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    spec = json.loads((release / "tokenizer.json").read_text())
    assert field("tokenizer.ggml.merges") == [" ".join(pair) for pair in spec["model"]["merges"]]
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    assert [field(f"tokenizer.ggml.{key}") for key in ("model", "pre", "add_bos_token")] == ["gpt2", "qwen2", False]
    assert field("tokenizer.chat_template") == (release / "chat_template.jinja").read_text()
    assert len(tokens) == len(set(tokens)) == config.vocab_size
    for index, token in enumerate(tokens):
        assert kinds[index] == (3 if index in ours.special_ids else 1 if ours.id_to_token(index) else 5)
        assert ours.id_to_token(index) in (token, None)


def test_nothing_is_overwritten_unasked_and_nothing_is_left_half(release: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"model.gguf: already exists; .*--overwrite"):
        convert([str(release), str(out)])
    with pytest.raises(ValueError, match=r"model.gguf: no GGUF file, so --overwrite does not replace it"):
        convert([str(release), str(out), "--overwrite"])
    out.write_text("GGUF of before")

    def full(*_: object) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as broken:
        broken.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        with pytest.raises(OSError, match="full"):
            convert([str(release), str(out), "--overwrite"])
    assert out.read_text() == "GGUF of before"
    (tmp_path / ".tide-tmp-1-model.gguf").write_text("left by a process that was killed")
    other = tmp_path / ".tide-tmp-2-small-model.gguf"  # which another process writes
    other.touch()
    convert([str(release), str(out), "--overwrite"])
    assert read_header(out).values["general.architecture"] == "qwen3"
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {"model.gguf", other.name}


def changed(folder: Path, name: str, **values: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("default", ["{{ messages }}", None])
def test_further_tokens_and_templates_by_name_do_not_go_in(tmp_path: Path, default: str | None) -> None:
    folder = changed(gguf_release(tmp_path / "release"), "tokenizer_config.json", image_token="<|im_end|>")
    (folder / "chat_template.jinja").unlink()
    named = {"rag": "other"} | ({"default": default} if default else {})
    changed(folder, "tokenizer_config.json", chat_template=named)
    written(folder, tmp_path / "model.gguf", "f32")
    header = read_header(tmp_path / "model.gguf")
    assert header.values.get("tokenizer.chat_template") == default
    assert "image_token" not in json.loads(header.values["megatron_tide.tokenizer_roles"])
    assert load_tokenizer(tmp_path / "model.gguf").fingerprint == load_tokenizer(folder).fingerprint


def linked(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.parent / "private.json")
    (folder / "tokenizer.json").symlink_to("../private.json")


def other_split(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def pieces(folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    train_sentencepiece(folder, TEXTS, 320)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder: ar_folder(folder, "qwen3"), "a qwen3 model; only a block diffusion model of Qwen3's shape"),
        (lambda folder: write_hub_folder(train_byte_bpe(folder, TEXTS, 310), tiny_llama_config()), "a a2d-llama model"),
        (lambda folder: other_split(gguf_release(folder)), "splits text by a rule that is none of qwen2, gpt-2"),
        (lambda folder: pieces(gguf_release(folder)), "no byte-level BPE tokenizer"),
        (lambda folder: gguf_release(folder, attention_bias=True), "its attention_bias is none that llama.cpp's"),
        (
            lambda folder: gguf_release(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}),
            "its rope_type is none that llama.cpp's",
        ),
        (lambda folder: linked(gguf_release(folder)), "private.json, outside its folder"),
        *(
            (
                lambda folder, odd=odd: changed(gguf_release(folder), "config.json", block_layout=odd),
                "use sequence or answer",
            )
            for odd in ("/home/someone", ["answer"], 3)
        ),
        (
            lambda folder: changed(gguf_release(folder), "config.json", max_position_embeddings=1 << 32),
            "max_position_embeddings is 4294967296",
        ),
        (lambda folder: gguf_release(folder, vocab_size=300), "310 tokens, but config.json has vocab_size 300"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object], line: str
) -> None:
    make(tmp_path / "folder")
    with pytest.raises(SystemExit) as ended:
        cli.run(convert, [str(tmp_path / "folder"), str(tmp_path / "model.gguf")])
    error = capsys.readouterr().err.strip()
    assert (ended.value.code, "\n" in error) == (2, False)
    assert line in error
    assert not (tmp_path / "model.gguf").exists()


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def patched(whole: bytes, after: bytes, change: bytes) -> bytes:
    place = whole.index(after) + len(after)
    return whole[:place] + change + whole[place + len(change) :]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda whole: b"GGML" + whole[4:], "does not begin as one"),
        (lambda whole: whole[:4] + struct.pack("<I", 1) + whole[8:], "does not begin as one"),
        (lambda whole: whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:], "tensors, of which none has more"),
        (lambda whole: whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:], "keys, of which none has more"),
        (lambda whole: whole[:24] + struct.pack("<Q", 1 << 60) + whole[32:], "bytes of a text, of which none"),
        (lambda whole: whole[: len(whole) // 2], "lies outside the file's"),
        (lambda whole: whole[:100], "ends in its header"),
        (
            lambda whole: patched(whole, key("tokenizer.ggml.tokens") + struct.pack("<II", 9, 8), b"\xff" * 8),
            "items of a list, of which none",
        ),
        (lambda whole: patched(whole, key("qwen3.block_count"), struct.pack("<II", 4, 1 << 31)), "tensors are not"),
        (lambda whole: patched(whole, key("qwen3.block_count"), struct.pack("<If", 6, 2)), "is a float, not a int"),
        (lambda whole: patched(whole, key("qwen3.attention.head_count"), struct.pack("<II", 4, 0)), "num_attention"),
        (lambda whole: patched(whole, key("qwen3.attention.head_count"), struct.pack("<II", 4, 7)), "none that atten"),
        (lambda whole: patched(whole, key("qwen3.attention.value_length"), struct.pack("<II", 4, 7)), "value_length"),
        (lambda whole: patched(whole, key("qwen3.embedding_length"), struct.pack("<II", 4, 32)), "of shape"),
        (lambda whole: patched(whole, key("megatron_tide.block_size"), struct.pack("<II", 4, 0)), "block_size is 0"),
        (lambda whole: patched(whole, key("megatron_tide.mask_token_id"), struct.pack("<II", 4, 320)), "token id is n"),
        (lambda whole: whole.replace(b"megatron_tide.block_size", b"megatron_tide.block_sizf"), "no block diffusion"),
        (lambda whole: whole.replace(b"general.name", b"split.count!"), "split.count!"),
        (lambda whole: whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"), "attn_q.weight is missing"),
        (
            lambda whole: patched(whole, key("blk.0.attn_q.weight") + struct.pack("<IQQ", 2, 64, 64), b"\x63\0\0\0"),
            "type 99",
        ),
        (lambda whole: patched(whole, key("blk.0.attn_q.weight"), struct.pack("<I", 9)), "axes"),
    ],
)
def test_a_corrupt_file_is_refused_in_one_line(
    release: Path, tmp_path: Path, change: Callable[[bytes], bytes], line: str
) -> None:
    out = tmp_path / "model.gguf"
    convert([str(release), str(out)])
    out.write_bytes(change(out.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.gguf: ") as refused:
        read_release(out)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_is_none_is_refused_in_one_line(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    convert([str(release), str(out)])
    whole = out.read_bytes()
    for old, new, line in (
        (b"tokenizer.huggingface.json", b"tokenizer.huggingface.jsox", "tokenizer.huggingface.json is missing"),
        (b'"eos_token": ', b'"auto_map":  ', "tokenizer_roles is no object"),
        (b'{"version": ', b'{"version"! ', "not valid JSON"),
    ):
        assert old in whole
        out.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=rf"^{out}: .*{line}"):
            load_tokenizer(out)
