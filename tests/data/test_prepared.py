"""A prepared folder: what was written is what is read, anything else is refused in one line that names the file."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from megatron_tide.data import PROMPT, UNALIGNED, PreparedData, Sample, TokenizedSample
from megatron_tide.data.batch import collate, read_batch
from megatron_tide.data.shard import Shard, pack, read_shard, shard_name, write_shard
from megatron_tide.files import fingerprint, sha256_file, write_json

VOCABULARY = {"student": 50, "teacher": 70}
BLOCK = {"student": 4, "teacher": 8}


def _side(rng: np.random.Generator, name: str, chunks: int) -> TokenizedSample:
    prompt, length = int(rng.integers(1, 6)), chunks + int(rng.integers(0, 5))
    chunk = np.sort(np.r_[np.arange(chunks), rng.integers(0, chunks, length - chunks)])
    return TokenizedSample(
        ids=rng.integers(0, VOCABULARY[name], prompt + length).astype(np.int32),
        chunk=np.r_[np.full(prompt, PROMPT), chunk].astype(np.int32),
        prompt=prompt,
        content_end=prompt + length - 1,
    )


def _samples(count: int, student_only: bool = False) -> list[Sample]:
    rng = np.random.default_rng(count)
    samples = []
    for key in range(count):
        chunks = int(rng.integers(1, 9))
        student, teacher = _side(rng, "student", chunks), _side(rng, "teacher", chunks)
        if student_only:
            chunk = np.where(student.chunk >= 0, UNALIGNED, student.chunk).astype(np.int32)
            student = TokenizedSample(
                ids=student.ids, chunk=chunk, prompt=student.prompt, content_end=student.content_end
            )
        two = {"teacher": None, "chunks": 0} if student_only else {"teacher": teacher, "chunks": chunks}
        samples.append(Sample(key=10 * key, student=student, response_bytes=key + 1, **two))
    return samples


def _write(folder: Path, shards: list[list[Sample]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        path = folder / shard_name(number)
        write_shard(path, samples, {"number": number})
        entries.append({"file": path.name, "rows": len(samples), "sha256": sha256_file(path)})
    manifest: dict[str, Any] = {"format": 2, "bridge": "b" * 64, "shards": entries}
    for name, size in VOCABULARY.items():
        manifest[name] = {"name": name, "fingerprint": name[0] * 64, "vocab_size": size, "block": BLOCK[name]}
        manifest[name] |= {"length": 64, "mask_id": 2, "eos_id": 1, "pad_id": 1}
    manifest |= changes
    write_json(folder / "manifest.json", manifest | {"fingerprint": fingerprint(manifest)})
    return folder


def _same(left: Sample, right: Sample) -> bool:
    sides = [(left.student, right.student)]
    if left.teacher is not None and right.teacher is not None:
        sides.append((left.teacher, right.teacher))
    return (
        (left.key, left.chunks, left.response_bytes, left.teacher is None)
        == (right.key, right.chunks, right.response_bytes, right.teacher is None)
        and all((a.prompt, a.content_end) == (b.prompt, b.content_end) for a, b in sides)
        and all(np.array_equal(a.ids, b.ids) and np.array_equal(a.chunk, b.chunk) for a, b in sides)
    )


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = _samples(20)
    data = PreparedData.open(_write(tmp_path / "data", [samples[:7], [], samples[7:19], samples[19:]]))
    assert len(data) == 20
    assert all(_same(data.sample(i), sample) for i, sample in enumerate(samples))
    assert data.stats.keys.tolist() == [sample.key for sample in samples]
    assert data.stats.student_length.tolist() == [len(sample.student.ids) for sample in samples]
    assert data.stats.maskable.tolist() == [len(sample.student.ids) - sample.student.prompt for sample in samples]
    assert not data.sample(3).student.ids.flags.writeable
    for outside in (-1, 20):
        with pytest.raises(IndexError):
            data.sample(outside)


def test_one_sided_data_have_no_teacher(tmp_path: Path) -> None:
    samples = _samples(5, student_only=True)
    data = PreparedData.open(_write(tmp_path / "data", [samples], teacher=None, bridge=None))
    assert data.student_only
    assert all(_same(data.sample(i), sample) for i, sample in enumerate(samples))
    assert data.stats.teacher_length.tolist() == [0] * 5
    assert read_batch(data, [0, 3]).teacher is None
    data.check(student="s" * 64)


def test_more_shards_than_may_be_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tide.data.prepared._OPEN_SHARDS", 2)
    samples = _samples(12)
    data = PreparedData.open(_write(tmp_path / "data", [samples[n : n + 2] for n in range(0, 12, 2)]))
    order = [11, 0, 5, 11, 3, 7, 0]
    assert all(_same(data.sample(i), samples[i]) for i in order)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, _samples(9), {"z": 1, "a": {"y": 2, "b": 3}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_batches_are_padded_to_whole_blocks(tmp_path: Path) -> None:
    samples = _samples(6)
    data = PreparedData.open(_write(tmp_path / "data", [samples]))
    batch = read_batch(data, np.array([4, 1, 2]))
    assert len(batch) == 3
    assert batch.keys.tolist() == [40, 10, 20]
    assert batch.chunks.tolist() == [samples[i].chunks for i in (4, 1, 2)]
    assert batch.teacher is not None
    for name, tokens in (("student", batch.student), ("teacher", batch.teacher)):
        sides = [getattr(samples[i], name) for i in (4, 1, 2)]
        longest = max(len(side.ids) for side in sides)
        assert tokens.ids.shape == tokens.chunk.shape == (3, -(-longest // BLOCK[name]) * BLOCK[name])
        dtypes = [t.dtype for t in (tokens.ids, tokens.chunk, tokens.length, tokens.prompt, tokens.content_end)]
        assert dtypes == [torch.int64, torch.int32, torch.int64, torch.int64, torch.int64]
        for row, side in enumerate(sides):
            length = len(side.ids)
            assert int(tokens.length[row]) == length
            assert (int(tokens.prompt[row]), int(tokens.content_end[row])) == (side.prompt, side.content_end)
            assert tokens.ids[row, :length].tolist() == side.ids.tolist()
            assert tokens.chunk[row, :length].tolist() == side.chunk.tolist()
            assert (tokens.ids[row, length:] == 1).all()
            assert (tokens.chunk[row, length:] == PROMPT).all()


def test_collating_samples_by_hand_needs_the_block_only() -> None:
    batch = collate(_samples(2), student_block=16)
    assert batch.student.ids.shape[1] % 16 == 0


def test_fingerprints_of_another_run_are_refused(tmp_path: Path) -> None:
    data = PreparedData.open(_write(tmp_path / "data", [_samples(3)]))
    right = {"student": "s" * 64, "teacher": "t" * 64, "bridge": "b" * 64}
    data.check(**right)
    for name in right:
        with pytest.raises(ValueError, match=f"manifest.json: prepared with (the )?{name}.*has xxxx"):
            data.check(**(right | {name: "x" * 64}))
    with pytest.raises(ValueError, match="this run has none"):
        data.check(student=right["student"])
    tokens = data.manifest["student"]["vocab_size"]
    data.check_model("student", "model", SimpleNamespace(vocab_size=tokens))
    with pytest.raises(ValueError, match=f"model: config.json has vocab_size {tokens - 1}, .* {tokens} tokens"):
        data.check_model("student", "model", SimpleNamespace(vocab_size=tokens - 1))
    mask = data.manifest["student"]["mask_id"]
    data.check_model("student", "model", SimpleNamespace(vocab_size=tokens, mask_token_id=mask))
    with pytest.raises(ValueError, match=f"mask_token_id {mask + 1}, .* was prepared with {mask}; .* --student-mask"):
        data.check_model("student", "model", SimpleNamespace(vocab_size=tokens, mask_token_id=mask + 1))


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _swap_rows(path: Path) -> None:
    write_shard(path, _samples(3), {"number": 1})


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("shard-00001.arrow", lambda path: _flip(path, -3), r"shard-00001\S*: its bytes changed"),
    ("shard-00001.arrow", lambda path: _flip(path, 30), r"shard-00001\S*: "),
    ("shard-00001.arrow", _cut, r"shard-00001\S*: truncated or not a shard"),
    ("shard-00001.arrow", lambda path: path.write_bytes(b""), r"shard-00001\S*: the shard is empty"),
    ("shard-00001.arrow", lambda path: path.write_bytes(b"\0" * 99), r"shard-00001\S*: truncated or not a shard"),
    ("shard-00001.arrow", lambda path: path.write_bytes(pickle.dumps([1] * 99)), r"truncated or not a shard"),
    ("shard-00001.arrow", Path.unlink, r"shard-00001\S*: the shard is missing"),
    ("shard-00001.arrow", _swap_rows, r"shard-00001\S*: its bytes changed"),
    ("manifest.json", Path.unlink, r"manifest\.json: no such file; .*not completely"),
    ("manifest.json", lambda path: path.write_text("{"), r"manifest\.json: not valid JSON"),
    ("manifest.json", lambda path: path.write_text("[]"), r"manifest\.json: contains a JSON list"),
    ("manifest.json", lambda path: path.write_text("{}"), r"manifest\.json: format None"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[Path], object], words: str) -> None:
    folder = _write(tmp_path / "data", [_samples(4), _samples(5)])
    damage(folder / name)
    with pytest.raises(ValueError, match=words) as caught:
        PreparedData.open(folder)
    assert "\n" not in str(caught.value)


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    folder = _write(tmp_path / "data", [_samples(4)])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["student"]["block"] = 16
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: does not match its own fingerprint"):
        PreparedData.open(folder)


def test_without_verifying_lengths_are_still_checked(tmp_path: Path) -> None:
    folder = _write(tmp_path / "data", [_samples(4), _samples(5)])
    pristine = tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    content = (folder / shard_name(1)).read_bytes()
    _flip(folder / shard_name(1), content.index(read_shard(folder / shard_name(1)).arrays["student_ids"].tobytes()))
    PreparedData.open(folder, verify=False)
    _cut(pristine / shard_name(1))
    with pytest.raises(ValueError, match="truncated"):
        PreparedData.open(pristine, verify=False)
    shutil.copy(folder / shard_name(0), pristine / shard_name(1))
    with pytest.raises(ValueError, match=r"shard-00001\S*: 4 samples, but 5 in the manifest"):
        PreparedData.open(pristine, verify=False)


def _wrong(sample: Sample, **changes: Any) -> Sample:
    student = {name: getattr(sample.student, name) for name in ("ids", "chunk", "prompt", "content_end")}
    fields = {name: getattr(sample, name) for name in ("key", "teacher", "chunks", "response_bytes")}
    return Sample(student=TokenizedSample(**(student | changes)), **fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda side: {"ids": side.ids + 50}, "student_ids outside the vocabulary of 50"),
        (lambda side: {"ids": side.ids - 50}, "student_ids outside the vocabulary"),
        (lambda side: {"chunk": np.where(side.chunk >= 0, 9, side.chunk)}, "student_chunk outside the chunks"),
        (lambda side: {"chunk": np.where(side.chunk >= 0, -3, side.chunk)}, "student_chunk outside the chunks"),
        (lambda side: {"chunk": np.full_like(side.chunk, PROMPT)}, "does not mark the same tokens as prompt"),
        (lambda side: {"content_end": len(side.ids)}, "content end is outside"),
        (lambda side: {"prompt": -1}, "prompt or content end is outside"),
    ],
)
def test_content_that_cannot_be_is_refused(
    tmp_path: Path, change: Callable[[TokenizedSample], dict[str, Any]], words: str
) -> None:
    good = _samples(3)
    folder = _write(tmp_path / "data", [[good[0], _wrong(good[1], **change(good[1].student)), good[2]]])
    with pytest.raises(ValueError, match=rf"shard-00000\S*: .*{words}"):
        PreparedData.open(folder)


def test_offsets_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "data", [_samples(4)])
    path = folder / shard_name(0)
    offsets = read_shard(path).arrays["student_offsets"].copy()  # the file's own changes with it
    other = offsets.copy()
    other[1] = 10**6
    content = path.read_bytes()
    path.write_bytes(content.replace(offsets.tobytes(), other.tobytes()))
    with pytest.raises(ValueError, match="student_offsets do not increase"):
        PreparedData.open(folder, verify=False)
    path.write_bytes(content.replace(offsets.tobytes(), other.tobytes(), 1))
    with pytest.raises(ValueError, match="student_ids and student_chunk have different lengths"):
        PreparedData.open(folder, verify=False)


@pytest.mark.parametrize("chunks", [-1, 99, 2**31 - 1])
def test_sizes_are_not_taken_on_faith(tmp_path: Path, chunks: int) -> None:
    sample = _samples(1)[0]
    folder = _write(tmp_path / "data", [[dataclasses.replace(sample, chunks=chunks)]])
    with pytest.raises(ValueError, match="more chunks than student tokens"):
        PreparedData.open(folder, verify=False)


def test_a_compressed_shard_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    batch, path = pack(_samples(4)), tmp_path / "shard-00000.arrow"
    for compression in ("lz4", "zstd"):
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        with pytest.raises(ValueError, match=r"shard-00000.arrow: .*compressed"):
            read_shard(path)


def test_any_damage_to_a_shard_gives_the_shard_or_one_line(tmp_path: Path) -> None:
    path, chance = tmp_path / "shard-00000.arrow", random.Random(0)
    write_shard(path, _samples(4), {"number": 0})
    good = path.read_bytes()
    for _ in range(300):
        content = bytearray(good[: chance.choice([len(good), chance.randrange(1, len(good))])])
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        path.unlink()
        path.write_bytes(content)
        shard = _read_or_refusal(path)
        if isinstance(shard, str):
            assert "\n" not in shard
            assert str(path) in shard
        else:
            assert all(len(array) <= len(good) for array in shard.arrays.values())
            assert not shard.intact() or bytes(content) == good


def _read_or_refusal(path: Path) -> Shard | str:
    try:
        return read_shard(path)
    except ValueError as error:
        return str(error)


def test_datasets_reads_the_samples(tmp_path: Path) -> None:
    samples = _samples(9)
    folder = _write(tmp_path / "data", [samples[:4], samples[4:]])
    files = [str(folder / shard_name(number)) for number in range(2)]
    columns = ["student_ids", "student_chunk", "teacher_ids", "teacher_chunk"]
    table = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files]).with_format("numpy")
    assert table.column_names == pack(samples).schema.names
    for row, sample in zip(table, samples, strict=True):
        sides = [getattr(sample, name.split("_")[0]) for name in columns]
        assert all(np.array_equal(row[n], getattr(s, n.split("_")[1])) for n, s in zip(columns, sides))
        assert (row["key"], row["chunks"]) == (sample.key, sample.chunks)


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "data", [_samples(4)], format=1)
    with pytest.raises(ValueError, match=r"manifest\.json: prepared by an older version; .* --fresh"):
        PreparedData.open(folder)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no sample"):
        PreparedData.open(_write(tmp_path / "data", [[]]))
    with pytest.raises(ValueError, match="no such folder"):
        PreparedData.open(tmp_path / "gone")
