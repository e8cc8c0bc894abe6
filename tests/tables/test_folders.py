"""Data folders of others: what they may name, unpack to, and be read as."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_tide.bridge.samples import read_samples
from megatron_tide.data.sources import DataSource, SourceSpec
from megatron_tide.tables import ArrowTable, Table, arrow, folders, open_table, unpack
from megatron_tide.tables.table import JoinedTable

ROW = {"messages": [{"role": "user", "content": "x"}]}
LINE = (json.dumps(ROW) + "\n").encode()


def opened(path: Path, split: str = "train") -> Table:
    return open_table(str(path), path.parent, name=None, split=split, revision=None)


def zipped(content: bytes, name: str = "rows.jsonl") -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return raw.getvalue()


@pytest.mark.parametrize(
    ("suffix", "packed"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zip", zipped)]
)
def test_a_compressed_file_is_read_unless_it_grows_beyond_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, packed
) -> None:
    monkeypatch.setattr(unpack, "_ROOM", 1 << 16)
    path = tmp_path / "data" / f"rows.jsonl{suffix}"
    path.parent.mkdir()
    path.write_bytes(packed(LINE * 3))
    assert [opened(path.parent).get(number) for number in range(3)] == [ROW] * 3
    path.write_bytes(packed(LINE + b" " * (1 << 24)))
    for _ in range(2):  # nothing that was unpacked halfway is taken for the whole
        with pytest.raises(ValueError, match=rf"rows\.jsonl{suffix}: expands to more than 64 times its size"):
            opened(path.parent)


def test_a_tar_is_known_by_its_first_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own test reads what a header says of its size, unpacked."""
    monkeypatch.setattr(unpack, "_PART", 1 << 12)
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 30
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(member.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 24))[:-10])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: an archive; unpack it"):  # not: cut off
        opened(tmp_path)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["./a.jsonl", "/b.jsonl", "../c.jsonl", "../c.jsonl", ".d.jsonl", "__e/f.jsonl", "g/.h/i.jsonl"], 4),
        (["a.jsonl", "README.txt"], "an archive of files of several kinds (.jsonl, .txt); unpack it"),
        ([".a.jsonl"], "an archive of 0 files; unpack it"),
    ],
)
def test_members_of_an_archive_are_read_or_it_is_refused(tmp_path: Path, names: list[str], wanted: int | str) -> None:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "train.jsonl.zip", "w") as archive:
        for name in names:
            archive.writestr(name, LINE)
    if isinstance(wanted, int):
        assert [opened(tmp_path).get(number) for number in range(len(opened(tmp_path)))] == [ROW] * wanted
    else:
        with pytest.raises(ValueError, match=re.escape(wanted)):
            opened(tmp_path)


@pytest.mark.parametrize(
    "content", [gzip.compress(LINE) + b"x", gzip.compress(LINE)[:-8] + bytes(8)], ids=["more behind it", "wrong sum"]
)
def test_a_corrupt_compressed_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train\.jsonl\.gz: cannot be unpacked \(.*\); restore it"):
        opened(tmp_path)


def test_the_name_of_an_archives_member_stays_on_its_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.zip").write_bytes(zipped(LINE, "a\n\x1bb.jsonl"))
    assert opened(tmp_path).where(0) == f"{tmp_path}/train.jsonl.zip/a b.jsonl:1"


@pytest.mark.parametrize("name", ["*.arrow", "dataset_info.json"])
def test_what_the_library_kept_is_made_again_where_it_is_broken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": [str(tmp_path)]}), path)
    for place in (tmp_path, path):
        table = opened(place)
        assert isinstance(table, ArrowTable)
        made = Path(table.table.cache_files[0]["filename"])
        (broken,) = made.parent.glob(name)
        broken.write_bytes(broken.read_bytes()[:99])
        assert opened(place).get(0) == {"text": str(tmp_path)}


def test_what_was_unpacked_is_unpacked_again_where_it_was_changed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINE * 3))
    table = opened(tmp_path)
    assert isinstance(table, JoinedTable)
    kept = table.parts[0].file.path
    kept.write_bytes(LINE)
    assert len(opened(tmp_path)) == 3
    kept.with_name("0.sha256").write_bytes(b"\xff")
    assert len(opened(tmp_path)) == 3


class Zstandard:
    """Frames as zlib makes them behind the magic of Zstandard, with the methods of ``zstandard``."""

    MAGIC = b"\x28\xb5\x2f\xfd"
    unused_data, eof = b"", False

    def decompressobj(self) -> Zstandard:
        self.seen, self.inner = b"", zlib.decompressobj()
        return self

    def decompress(self, part: bytes) -> bytes:
        before, self.seen = max(4 - len(self.seen), 0), self.seen + part[:4]
        made = self.inner.decompress(part[before:])
        self.unused_data, self.eof = self.inner.unused_data, self.inner.eof
        return made


@pytest.mark.parametrize("real", [False, True])
def test_all_frames_of_a_zstandard_file_are_read_and_none_that_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool
) -> None:
    if real:
        frame = pytest.importorskip("zstandard").ZstdCompressor().compress(LINE * 3)
    else:
        monkeypatch.setitem(sys.modules, "zstandard", SimpleNamespace(ZstdDecompressor=Zstandard))
        frame = Zstandard.MAGIC + zlib.compress(LINE * 3)
    (tmp_path / "train.jsonl.zst").write_bytes(frame * 2)
    assert len(opened(tmp_path)) == 6
    (tmp_path / "train.jsonl.zst").write_bytes((frame * 2)[:-3])
    with pytest.raises(ValueError, match=r"train\.jsonl\.zst: cannot be unpacked \(cut off\); restore it"):
        opened(tmp_path)


def test_archives_and_what_is_no_text_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "rows.jsonl.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: an archive; unpack it"):
        opened(tmp_path)
    (tmp_path / "rows.jsonl.gz").unlink()
    (tmp_path / "task.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="its files are read as xml, not as rows of text"):
        opened(tmp_path)


def test_a_page_that_stands_for_more_than_it_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long value, and a row after the other that refers to it; a sample of it takes no more memory either."""
    monkeypatch.setattr(unpack, "_ROOM", 1 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array(["x" * 100_000]))
    parquet.write_table(pa.table({"text": column}), tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"rows\.parquet: expands to more than 64 times its size"):
        opened(tmp_path / "rows.parquet")
    assert read_samples([tmp_path / "rows.parquet"], 2) == ["x" * 100_000] * 2


def test_a_data_set_takes_no_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MEMORY", 1 << 26)
    with pytest.raises(MemoryError), folders.bounded(0):
        bytearray(1 << 28)
    assert len(bytearray(1 << 28)) == 1 << 28


def test_rows_that_refer_to_a_long_value_are_scanned_one_by_one(tmp_path: Path, monkeypatch) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), pa.array(["x" * 1000, "y"]))
    table = pa.table({"kind": column})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    found = ArrowTable(arrow.read_saved([tmp_path / "a.arrow"]), "a", "")
    whole = list(found.scan(["kind"]))
    assert [len(row[0]) for row in whole if row] == [1000, 1, 1000]
    monkeypatch.setattr(arrow, "_AT_ONCE", 100)
    assert list(found.scan(["kind"])) == whole


def test_of_a_folder_s_files_bad_rows_are_left_out_and_odd_ones_end_nothing(tmp_path: Path) -> None:
    """Whatever the files are called, and whatever the library makes of dates and of rows of another type."""
    dated = {"messages": [{"role": "user", "content": "2021-02-03 04:05:06"}]}
    lines = [LINE, b"{broken\n", json.dumps(dated).encode() + b"\n", b'{"messages": "text"}\n', b'{"other": 1}\n']
    for name, content in (("part-1.jsonl", b"".join(lines)), ("part-2.json", b""), ("part-3.jsonl", LINE)):
        (tmp_path / name).write_bytes(content)
    table = opened(tmp_path)
    with pytest.raises(ValueError, match=r"part-1\.jsonl:2: not valid JSON"):
        table.get(1)
    assert [table.get(n) for n in (0, 2, 3, 4, 5)] == [ROW, dated, {"messages": "text"}, {"other": 1}, ROW]
    assert table.where(5) == f"{tmp_path / 'part-3.jsonl'}:1"
    assert len(list(table.scan(["messages"]))) == len(table) == 6
    (tmp_path / "part-2.json").write_text(f"\n[\n{json.dumps(ROW)}\n]\n")
    (tmp_path / "part-1.jsonl").write_bytes(LINE)
    assert [opened(tmp_path).get(number) for number in range(3)] == [ROW] * 3
    parquet.write_table(pa.Table.from_pylist([ROW]), tmp_path / "more.parquet")
    with pytest.raises(ValueError, match=r"it has rows in .*json.* and in more\.parquet: keep files of one format"):
        opened(tmp_path)


def test_what_says_which_files_are_read_is_part_of_the_content(tmp_path: Path) -> None:
    found = []
    for number, name in enumerate(("a.csv", "b.csv")):
        (tmp_path / name).write_text(f"x\n{number}\n")
    for name in ("a.csv", "b.csv", ".b.csv"):
        about = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n"
        (tmp_path / ".huggingface.yaml").write_text(about)
        if name == ".b.csv":
            with pytest.raises(ValueError, match=r"names '\.b\.csv', which is hidden or not in its folder"):
                opened(tmp_path)
        else:
            found.append((opened(tmp_path).get(0), opened(tmp_path).content))
    assert [row for row, _ in found] == [{"x": "0"}, {"x": "1"}]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("place", ["data", "data/rows.parquet"])
def test_what_changes_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows, old, new = folders._rows, [{"text": "old"}], [{"text": "another"}]
    for number in range(2):  # of the first content there is nothing kept when it is there again
        parquet.write_table(pa.Table.from_pylist(old), tmp_path / "data/rows.parquet")

        def late(*asked, number=number):
            if number == 0:
                parquet.write_table(pa.Table.from_pylist(new), tmp_path / "data/rows.parquet")
            return rows(*asked)

        monkeypatch.setattr(folders, "_rows", late)
        if number == 0:
            with pytest.raises(ValueError, match="changed while it was read; start again"):
                opened(tmp_path / place)
        else:
            assert opened(tmp_path / place).get(0) == old[0]


def test_parquet_files_of_other_columns_are_one_data_set(tmp_path: Path) -> None:
    rows = [ROW, {"messages": "text"}, {"text": "x"}, {**ROW, "kind": "a"}]
    for number, row in enumerate(rows):
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / f"part-{number}.parquet")
    source = DataSource.open(SourceSpec(path=str(tmp_path)), tmp_path)
    found = [source.rows.get(int(row)).get("messages") for row in source.selected]
    assert found == [ROW["messages"], "text", None, ROW["messages"]]
    filtered = DataSource.open(SourceSpec(path=str(tmp_path), filter={"kind": "a"}), tmp_path)
    assert filtered.selected.tolist() == [3]


@pytest.mark.timeout(60)
def test_no_picture_that_a_row_names_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "secret.png")
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Image()})}
    )
    rows = [{"messages": [{"role": "user", "content": {"path": str(tmp_path / "secret.png"), "bytes": None}}]}]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data/rows.parquet")
    for place in (tmp_path / "data/rows.parquet", tmp_path / "data"):
        assert opened(place).get(0)["messages"][0]["content"] == {"path": str(tmp_path / "secret.png")}


def test_a_card_that_its_readers_overlook_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINE)
    about = "configs:\r\n- config_name: default\r\n  data_files:\r\n  - split: train\r\n    path: rows.jsonl"
    (tmp_path / "README.md").write_bytes(f"---\r\n{about}\r\n---\r\n".encode())
    (tmp_path / "more.jsonl").write_bytes(LINE)
    assert len(opened(tmp_path)) == 1
    (tmp_path / "README.md").write_bytes(f"\ufeff---\n{about}\n---\n".encode())
    with pytest.raises(ValueError, match=r"README\.md: begins with a byte-order mark"):
        opened(tmp_path)
    (tmp_path / "README.md").write_text(f"---\nx: {'a' * 2_000_000}\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: its front matter has more than"):
        opened(tmp_path)
