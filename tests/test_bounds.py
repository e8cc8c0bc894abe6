"""Sizes that files state are refused, with one line, before memory is taken for them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from megatron_tide.bounds import CONFIG, MOST_IDS
from megatron_tide.bridge import Bridge, load_tokenizer
from megatron_tide.bridge.artifact import _fingerprint
from megatron_tide.gguf_header import read_header
from megatron_tide.models.families import read_config
from megatron_tide.models.shards import INDEX, ShardedFolder
from tests.support.lab import Lab


def refused(made: object, *words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        made()  # type: ignore[operator]
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"])
def test_sizes_of_a_configuration(lab: Lab, key: str) -> None:
    values = json.loads((Path(lab.student) / "config.json").read_text())
    for size in (10**9 * 10, CONFIG[key] + 1, 1e300):
        refused(lambda size=size: read_config({**values, key: size}), key, str(CONFIG[key]))


@pytest.mark.parametrize("index", [MOST_IDS, 4_000_000_000])
def test_an_id_of_a_vocabulary(lab: Lab, tmp_path: Path, index: int) -> None:
    folder = shutil.copytree(lab.student, tmp_path / "student")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["far"] = index
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    refused(lambda: load_tokenizer(folder), str(index), "far")
    refused(lambda: load_tokenizer(lab.student, mask_token=str(index)), str(index))


@pytest.mark.parametrize("token", [b"a" * 1_000_000, b"ab"])
def test_a_token_of_a_tiktoken_file(tmp_path: Path, token: bytes) -> None:
    rows = [*((bytes([byte]), byte) for byte in range(256)), (token, 256 if len(token) > 2 else 4_000_000_000)]
    file = tmp_path / "x.tiktoken"
    file.write_text("".join(f"{base64.b64encode(part).decode()} {rank}\n" for part, rank in rows))
    (tmp_path / "x.tiktoken.json").write_text(json.dumps({"pattern": "."}))
    refused(lambda: load_tokenizer(file), "1000000 bytes" if len(token) > 2 else "4000000000")


def test_the_prefix_of_a_bridge(lab: Lab, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(lab.student)
    bridge = Bridge.build(tokenizer, tokenizer, ["a text"])
    for prefix in (10**9, -1, tokenizer.vocab_size + 1, True):
        bridge.manifest["shared_prefix"] = prefix
        bridge.manifest["fingerprint"] = _fingerprint(bridge.manifest)
        bridge.save(tmp_path)
        refused(lambda: Bridge.load(tmp_path), "shared_prefix")


def test_a_file_with_holes_is_not_read_as_long_as_it_says(tmp_path: Path) -> None:
    """A terabyte that takes no disk."""
    long, file = 1 << 36, tmp_path / "a.gguf"
    key = struct.pack("<Q", 1) + b"k"
    for value in (struct.pack("<IQ", 8, long), struct.pack("<IIQ", 9, 0, long), struct.pack("<IIQQ", 9, 8, 1, long)):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value)
        os.truncate(file, 2 * long)
        with pytest.raises(
            ValueError, match=r"a\.gguf: not a GGUF file that can be used \((a value of )?68719476736 (bytes|items)"
        ):
            read_header(file)
    shard = tmp_path / "part.safetensors"
    shard.write_bytes(struct.pack("<Q", long))
    os.truncate(shard, 2 * long)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard.name}}))
    with pytest.raises(ValueError, match=r"part\.safetensors: cannot be read \(its header of 68719476736 bytes"):
        ShardedFolder(tmp_path).fingerprint()
