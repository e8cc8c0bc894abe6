"""Arrow files of others: corrupt and compressed ones are refused in one line before anything reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_tide.tables.arrow import check_stream, read_saved

TABLE = pa.table({"text": ["one", "two", None], "kind": pa.array(["a", "b", "a"]).dictionary_encode()})


def written(path: Path, table: pa.Table = TABLE, compression: str | None = None) -> Path:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as out:
        out.write_table(table)
    return path


def test_whole_streams_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.arrow")
    check_stream(path)
    found = read_saved([path, written(tmp_path / "b.arrow")])
    assert found[4]["text"] == "two"
    with pa.ipc.new_file(tmp_path / "file.arrow", TABLE.schema) as out:
        out.write_table(TABLE)
    check_stream(tmp_path / "file.arrow")


@pytest.mark.parametrize("table", [TABLE, TABLE.select(["text"])], ids=["with dictionaries", "text"])
def test_compressed_columns_are_refused(tmp_path: Path, table: pa.Table) -> None:
    with pytest.raises(ValueError, match=r"a\.arrow: corrupt, or no Arrow file that can be read \(compressed\)"):
        check_stream(written(tmp_path / "a.arrow", table, "zstd"))


def test_offsets_and_text_outside_their_column_are_refused(tmp_path: Path) -> None:
    content = written(tmp_path / "a.arrow", TABLE.select(["text"])).read_bytes()
    for old, new in (((0, 3, 6, 6), (0, 3, 2**30, 6)), ((0, 3, 6, 6), (0, -9, 6, 6))):
        offsets = [b"".join(one.to_bytes(4, "little", signed=True) for one in numbers) for numbers in (old, new)]
        assert offsets[0] in content
        (tmp_path / "a.arrow").write_bytes(content.replace(*offsets))
        with pytest.raises(ValueError, match=r"a\.arrow: corrupt"):
            read_saved([tmp_path / "a.arrow"])
    (tmp_path / "a.arrow").write_bytes(content.replace(b"onetwo", b"one\xfftw"))
    with pytest.raises(ValueError, match=r"a\.arrow: corrupt"):
        read_saved([tmp_path / "a.arrow"])
    other = written(tmp_path / "b.arrow", TABLE.select(["kind"]))
    with pytest.raises(ValueError, match=r"not of one data set"):
        read_saved([written(tmp_path / "a.arrow", TABLE.select(["text"])), other])


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.arrow")
    for read in (check_stream, lambda path: read_saved([path])):
        with pytest.raises(OSError, match=r"rows\.arrow: not a regular file"):
            read(tmp_path / "rows.arrow")
