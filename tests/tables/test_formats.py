"""CSV, JSON lists and compressed files row by row, against Python's own readers; a bad row is one bad row."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.data.sources import DataSource, SourceSpec, open_mixture
from megatron_tide.tables import Table, formats, open_table, read_rows, table
from megatron_tide.tables.formats import Csv, JsonLines, JsonList, json_format

TALK = {"messages": [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": "x"}]}
COLUMNS = ["prompt", "response"]


def opened(folder: Path) -> Table:
    return open_table(str(folder), folder.parent, name=None, split="train", revision=None)


def rows_of(table: Table) -> list[Any]:
    """Each row, or why it cannot be read, by number and in order: the same."""
    found: list[Any] = []
    for number in range(len(table)):
        try:
            found.append(table.get(number))
        except ValueError as error:
            found.append(str(error))
    columns = table.columns
    values = [tuple(map(row.get, columns)) if isinstance(row, dict) else None for row in found]
    assert list(table.scan(columns)) == values
    return found


FIELD = st.text(st.sampled_from('ab é\u2028",;\n\r\t\x00'), max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD), max_size=5),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows, quoting, end) -> None:
    if quoting == csv.QUOTE_MINIMAL and end == "\n":  # Python does not quote a carriage return then
        rows = [tuple(one.replace("\r", "") for one in row) for row in rows]
    path = tmp_path_factory.mktemp("rows") / "train.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator=end)
        writer.writerows([COLUMNS, *rows])
    table = opened(path.parent)
    assert rows_of(table) == [dict(zip(COLUMNS, row)) for row in rows]
    before = [path.read_bytes()[: int(start)].count(b"\n") for start in table.parts[0].starts]
    assert [table.where(number) for number in range(len(rows))] == [f"{path}:{1 + lines}" for lines in before]


def test_values_of_csv_are_text_as_it_stands(tmp_path: Path) -> None:
    """The library makes a number, a missing value or a truth of them."""
    said = ["None", "NA", "007", "1.0", "True", "", "2024-01-01", " x "]
    (tmp_path / "train.csv").write_text("prompt,response\n" + "".join(f"q,{one}\n" for one in said))
    assert [row["response"] for row in rows_of(opened(tmp_path))] == said
    source = DataSource.open(
        SourceSpec(path=str(tmp_path), prompt_column="prompt", response_column="response"), tmp_path
    )
    assert [source.conversation(n)[1]["content"] for n in range(len(said))] == said


def test_bad_rows_of_csv_are_left_out_and_named(tmp_path: Path) -> None:
    bad = [
        b"a,b,c\n",
        b'"he said "hi" to me",x\n',
        b"a,\xff\n",
        b'"never closed,x\n',
        b"a\rb,x\n",
        b"lacks its answer\n",
    ]
    content, wanted = [b"prompt,response\n"], list[str | dict[str, str]]()
    reasons = ["3 fields, where the header names 2", "not valid CSV", "not UTF-8", "not valid CSV", "not valid CSV"]
    for number, row in enumerate(bad):
        content += [b'"good, %d\nof two lines",y\n' % number, row]
        wanted.append({"prompt": f"good, {number}\nof two lines", "response": "y"})
        wanted.append(reasons[number] if number < len(reasons) else {"prompt": "lacks its answer"})
    path = tmp_path / "train.csv"
    path.write_bytes(b"".join([*content, b"\n", b'last,"one without a line feed"']))
    *found, last = rows_of(opened(tmp_path))
    assert last == {"prompt": "last", "response": "one without a line feed"}
    for number, (row, want) in enumerate(zip(found, wanted, strict=True)):
        if isinstance(want, dict):
            assert row == want
        else:
            assert row.startswith(f"{path}:{4 + 3 * (number // 2)}: ")
            assert want in row


def test_a_quote_that_is_never_closed_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing behind it closes it, and where that is further away than a row may be long."""
    path = tmp_path / "train.csv"
    for limit, count in ((formats.ROW_BYTES, 10), (200, 100)):
        monkeypatch.setattr(formats, "ROW_BYTES", limit)
        path.write_text('prompt,response\n"open,x\n' + "question,answer\n" * count)
        bad, *good = rows_of(opened(tmp_path))
        assert bad.startswith(f"{path}:2: not valid CSV")
        assert good == [{"prompt": "question", "response": "answer"}] * count


def test_a_row_of_csv_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ROW_BYTES", 100)
    (tmp_path / "train.csv").write_text(f'prompt,response\na,{"x" * 300}\nb,"y\nz"\n')
    bad, good = rows_of(opened(tmp_path))
    assert "train.csv:2: a row of more than 100 bytes" in bad
    assert good == {"prompt": "b", "response": "y\nz"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b,a\n1,2,3\n", "train.csv:1: two columns 'a'; rename one"),
        (b"\xff,b\n1,2\n", "train.csv:1: not UTF-8"),
        (b'"a,b\n1,2\n', "train.csv:1: not valid CSV"),
    ],
)
def test_a_header_that_names_no_columns_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_columns_may_be_separated_by_tabs_or_as_the_folder_says(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("prompt\tresponse\na,b\tc\n")
    assert rows_of(opened(tmp_path)) == [{"prompt": "a,b", "response": "c"}]
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "train.csv").write_text("prompt;response\na,b;c\n")
    about = "configs:\n- config_name: default\n  data_files: train.csv\n  sep: ;\n"
    (tmp_path / "README.md").write_text(f"---\n{about}---\n")
    assert rows_of(opened(tmp_path)) == [{"prompt": "a,b", "response": "c"}]
    (tmp_path / "README.md").write_text(f"---\n{about}  skiprows: 1\n  names: [x, y]\n---\n")
    assert rows_of(opened(tmp_path)) == [{"x": "a,b", "y": "c"}]  # what only the library knows


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('aé",[]{}\\\n:'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=4),
    indent=st.sampled_from([None, 0, 2]),
)
def test_a_json_list_is_its_items(tmp_path_factory: pytest.TempPathFactory, rows, indent) -> None:
    path = tmp_path_factory.mktemp("rows") / "train.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    path.write_text(f"\ufeff \n{text}\n", encoding="utf-8")
    found = list(JsonList().split(path, "f"))
    assert [json.loads(raw) for _, _, raw in found] == rows
    content = path.read_bytes()
    for line, start, raw in found:
        assert content[start : start + len(raw)] == raw
        assert line == 1 + content[:start].count(b"\n")


def test_an_odd_item_of_a_json_list_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ROW_BYTES", 200_000)
    deep = b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    odd = [
        b"3",
        b'"text"',
        b"[1]",
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": "\xff"}',
        b'{"a": 1}}',
        deep,
        b" ",
        b'{"a": "%b"}' % (b"x" * 200_000),
    ]
    items = [part for one in odd for part in (b'{"messages": "]"}', one)]
    (tmp_path / "train.json").write_bytes(b"[\n" + b",\n".join(items) + b"\n]\n")
    found = rows_of(opened(tmp_path))
    assert found[::2] == [{"messages": "]"}] * len(odd)
    words = ["a int, not", "a str, not", "a list, not", *["not valid JSON"] * 2, "not UTF-8", *["not valid JSON"] * 3]
    for number, (row, want) in enumerate(zip(found[1::2], [*words, "a row of more than 200,000 bytes"], strict=True)):
        assert want in row
        assert want == "not valid JSON" or f"train.json:{2 * number + 3}:" in row


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": 2}', "without its end"),
        ('[{"a": "x]', "without its end"),
        ('[{"a": 1}] x', "more than one JSON value"),
        ("[{}\n]\n[{}\n]", "more than one JSON value"),
    ],
)
def test_a_json_list_that_is_cut_off_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=rf"train\.json: .*{words}"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "format"),
    [
        ("a.json", '{"a": 1}\n', JsonLines()),
        ("a.json", '{oops\n{"a": 1}\n', JsonLines()),
        ("a.json", '[1]\n{"a": 1}\n', JsonLines()),
        ("a.json", "[1]\n", JsonList()),
        ("a.json", '[\n{"a": 1}]\n', JsonList()),
        ("a.json", '{\n"a": 1\n}\n', None),
        ("a.jsonl", "{oops\n" * 200 + '{"a": 1}\n', JsonLines()),
        ("a.ndjson.gz", "{oops\n" * 200 + '{"a": 1}\n', JsonLines()),
        ("a.json", "", JsonLines()),
    ],
)
def test_the_format_of_a_json_file(tmp_path: Path, name: str, text: str, format: object) -> None:
    (tmp_path / name).write_text(text)
    assert json_format(tmp_path / name, name) == format


def zipped(content: bytes) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("rows.jsonl", "__MACOSX/._rows.jsonl", ".hidden/x.jsonl"):
            archive.writestr(name, content)
    return raw.getvalue()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zip": zipped}


@pytest.mark.parametrize(("suffix", "packed"), PACKED.items())
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_bad_row_of_a_compressed_file_is_left_out(
    tmp_path: Path, name: str, suffix: str, packed: Callable[[bytes], bytes]
) -> None:
    good, bad = json.dumps(TALK).encode() + b"\n", b"{broken\n"
    if name.endswith(".csv"):
        good, bad = b"a,b\n", b"a,b,c\n"
    path = tmp_path / "data" / f"{name}{suffix}"
    path.parent.mkdir()
    lines = [b"prompt,response\n" if name.endswith(".csv") else good, good, bad, good]
    path.write_bytes(packed(b"".join(lines)))
    found = rows_of(opened(path.parent))
    assert [one for one in found if isinstance(one, str)] == [found[-2]]
    assert found[-2].startswith(f"{path}{'/rows.jsonl' if suffix == '.zip' else ''}:3: ")
    assert len(found) == (3 if name.endswith(".csv") else 4)
    path.write_bytes(packed(b"".join([*lines, good])))  # what was unpacked is not that of another content
    assert len(opened(path.parent)) == len(found) + 1
    path.write_bytes(packed(b"".join(lines))[:-20])
    with pytest.raises(ValueError, match="cannot be read as a data set") as caught:
        opened(path.parent)
    assert "\n" not in str(caught.value)


def test_a_file_of_bad_rows_among_others_is_counted_not_the_end(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"train-{number}.jsonl").write_text((json.dumps(TALK) + "\n") * 150)
    (tmp_path / "train-2.jsonl").write_text("{broken\n")
    mixture = open_mixture([str(tmp_path)])
    assert [bool(mixture.error(number)) for number in range(len(mixture))] == [False] * 300 + [True]
    for number in range(2):
        (tmp_path / f"train-{number}.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"train-0\.jsonl:1: not valid JSON"):
        open_mixture([str(tmp_path)])


def naive_records(lines: list[str]) -> list[str]:
    """Each row that Python's reader finds at a line; where it finds none, that line."""
    found, place = list[str](), 0
    while place < len(lines):
        feed = iter(lines[place:])
        try:
            next(csv.reader(feed, strict=True))
            count = len(lines) - place - len(list(feed))
        except csv.Error:
            count = 1
        found.append("".join(lines[place : place + count]))
        place += count
    return [one for one in found if one.strip("\r\n")]


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.sampled_from('a",\n\n""\r'), max_size=30))
def test_rows_of_csv_are_those_that_python_finds(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("rows") / "f"
    path.write_bytes(text.encode())
    found = list(Csv(())._records(path, "f"))
    assert [raw.decode() for _, _, raw in found] == naive_records(
        [line + "\n" for line in text.split("\n")[:-1]] + [line for line in text.split("\n")[-1:] if line]
    )
    assert all(text.encode()[start : start + len(raw)] == raw for _, start, raw in found)


@pytest.mark.parametrize("limit", [formats.ROW_BYTES, 100])
def test_quotes_that_stay_open_are_read_in_linear_time(tmp_path: Path, monkeypatch, limit: int) -> None:
    monkeypatch.setattr(formats, "ROW_BYTES", limit)
    (tmp_path / "f").write_text('x","\n' * 300)  # opens a quote, and leaves one open
    read, state = [], Csv._state
    monkeypatch.setattr(Csv, "_state", lambda *given: read.append(given) or state(*given))
    assert len(list(Csv(())._records(tmp_path / "f", "f"))) == 300
    assert len(read) <= 600


def test_a_byte_order_mark_is_none_of_the_first_name_and_stays_in_a_cell(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('\ufeff"a\nb",c\n\ufeffx,y\n', encoding="utf-8")
    assert rows_of(opened(tmp_path)) == [{"a\nb": "\ufeffx", "c": "y"}]


def test_a_separator_of_several_bytes_is_left_to_the_library(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('a\u00e9b\n"x\u00e9"\u00e9"y\nz"\n', encoding="utf-8")
    about = "configs:\n- config_name: default\n  data_files: train.csv\n  sep: \u00e9\n"
    (tmp_path / "README.md").write_text(f"---\n{about}---\n", encoding="utf-8")
    assert rows_of(opened(tmp_path)) == [{"a": "x\u00e9", "b": "y\nz"}]


def test_a_file_without_rows_is_given_up_after_rows_not_lines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table, "HOPELESS", 3)
    (tmp_path / "train.jsonl").write_text("\n" * 9 + "{broken\n" + '{"a": 1}\n' * 200)
    assert len(opened(tmp_path)) == 201
    assert len(list(read_rows(tmp_path / "train.jsonl", []))) == 200
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.json").write_text('[0,0,0,0,{"a": 1}]')
    with pytest.raises(ValueError, match="not an object"):
        opened(tmp_path)


def test_a_list_longer_than_a_row_of_lines_may_be_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(formats, "ROW_BYTES", 100)
    monkeypatch.setattr(formats, "_LONGEST", 200)
    (tmp_path / "train.json").write_text(json.dumps([{"a": 1}] * 100))
    assert rows_of(opened(tmp_path)) == [{"a": 1}] * 100
    (tmp_path / "train.json").write_text(json.dumps([{"a": "x" * 300}]))
    with pytest.raises(ValueError, match=r"train\.json:1: an item of more than 200 bytes"):
        opened(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_json_file_of_another_encoding_is_told(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "train.json").write_text('{"a": "h\u00e9"}\n' * 200, encoding=encoding)
    with pytest.raises(ValueError, match=r"train\.json:1: not UTF-8"):
        opened(tmp_path)
