"""JSON Lines as people really have them, by the one reader of the project, and what is no row."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.packaged_modules.csv import csv as csv_module
from datasets.packaged_modules.json import json as json_module

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.samples import read_samples
from megatron_tide.bridge.train_tokenizers import read_messages
from megatron_tide.data.sources import open_mixture
from megatron_tide.generate.prompts import read_prompts
from megatron_tide.tables import (
    LONGEST_TEXT,
    Table,
    check_bad,
    conversation,
    formats,
    good_rows,
    open_table,
    parse_messages,
    read_rows,
)

TURN = {"role": "user", "content": "x"}


def opened(path: Path) -> Table:
    return open_table(str(path), path.parent, name=None, split="train", revision=None)


def _both(path: Path) -> list[dict[str, object]]:
    """The rows of a file, read in order and by number: the same."""
    rows = [row for _, row in read_rows(path)]
    table = opened(path)
    assert [table.get(number) for number in range(len(table))] == rows
    assert [where for where, _ in read_rows(path)] == [table.where(number) for number in range(len(table))]
    return rows


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        (b'{"a": 1}\r\n\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),
        (b'\xef\xbb\xbf\n\n  \n{"a": 1}', [{"a": 1}]),
        ('{"a": "one\u2028two\x85three\u2029"}\n'.encode(), [{"a": "one\u2028two\x85three\u2029"}]),
        (b'{"a": "\\ud800"}\n', [{"a": "\ud800"}]),
        (b"", []),
    ],
)
def test_lines_as_people_have_them(tmp_path: Path, content: bytes, rows: list[dict[str, object]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert _both(path) == rows


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{oops", r"rows\.jsonl:3: not valid JSON"),
        (b"[1]", r"rows\.jsonl:3: a list, not an object"),
        (b'{"a": "\xff"}', r"rows\.jsonl:3: not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"rows\.jsonl:3: not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", r"rows\.jsonl:3: not valid JSON"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"b": 2}\n')
    table = opened(path)
    assert table.columns == ["a", "b"]
    assert (table.get(0), table.get(2)) == ({"a": 1}, {"b": 2})
    assert list(table.scan(["a", "b"])) == [(1, None), None, (None, 2)]
    with pytest.raises(ValueError, match=words) as caught:
        table.get(1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=words):
        list(read_rows(path))
    bad: list[str] = []
    assert [row for _, row in read_rows(path, bad)] == [{"a": 1}, {"b": 2}]
    assert len(bad) == 1
    assert re.search(words, bad[0])


def test_a_file_without_a_row_that_can_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("PK\x03\x04\n" * 3)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not valid JSON"):
        opened(path)


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = parse_messages([TURN | {"content": parts}, TURN | {"content": None, "name": "n"}], "here")
    assert messages == [{"role": "user", "content": "one two"}, {"role": "user", "content": "", "name": "n"}]


@pytest.mark.parametrize(
    "content",
    [["one"], [{"type": "image"}], [{"type": "image_url", "text": ""}], [{"type": "text", "text": "x"}, {}], 3, {}],
)
def test_content_that_is_no_text_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match=r"^here: message 1: role and content must be text"):
        parse_messages(json.loads(json.dumps([TURN, TURN | {"content": content}])), "here")


@pytest.mark.parametrize("name", ["text", "value", "parts"])
def test_a_message_whose_text_is_under_another_name_is_refused(name: str) -> None:
    said = {"role": "user", name: "x"}
    for message in (said, {**said, "content": None}, {**said, "content": " "}):
        with pytest.raises(ValueError, match=f"^here: message 1: its text is in '{name}'"):
            parse_messages([TURN, message], "here")
    assert parse_messages([{**said, "content": "y"}, {"role": "user"}], "here")[0] == {"role": "user", "content": "y"}


def test_what_stands_beside_the_messages_of_a_row_comes_with_the_first() -> None:
    tools = [{"name": "weather"}]
    row = {"messages": [TURN, TURN], "tools": json.dumps(tools), "images": [{"path": "a.png"}], "image": "no picture"}
    first, second = conversation(row, "messages", "here")
    assert first == {**TURN, "tools": tools, "images": [{"path": "a.png"}]}
    assert second == TURN
    assert conversation({"messages": []}, "messages", "here") == []


def test_keys_that_arrow_adds_to_objects_are_not_read(tmp_path: Path) -> None:
    """One row's call has a city, another's a day; Arrow gives both to both."""
    calls = [[{"function": {"name": "f", "arguments": {key: 1}}}] for key in ("city", "day")]
    rows = [{"messages": [{**TURN, "tool_calls": one}], "empty": None} for one in calls]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    table = opened(path)
    assert [table.get(number)["messages"][0]["tool_calls"] for number in range(2)] == calls
    assert "empty" in table.get(0)


def test_a_row_that_is_too_long_is_left_out_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ROW_BYTES", 30)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": " " * 200}) + "\n" + json.dumps({"a": 2}) + "\n")
    bad: list[str] = []
    assert [row for _, row in read_rows(path, bad)] == [{"a": 1}, {"a": 2}]
    assert len(bad) == 1
    assert "rows.jsonl:2: a row of more than 30 bytes" in bad[0]
    assert opened(path).get(2) == {"a": 2}


def test_a_file_that_changes_while_its_rows_are_read_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    table = pickle.loads(pickle.dumps(opened(path)))  # as a worker has it
    assert table.get(1) == {"a": 2}
    (tmp_path / "new").write_text('{"a": 3}\n{"a": 44}\n')
    (tmp_path / "new").rename(path)
    with pytest.raises(OSError, match=r"rows\.jsonl: changed while it was read; start again"):
        table.get(1)


def test_few_bad_rows_are_told_and_many_end_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    def read(row: dict[str, object], where: str) -> object:
        if row["a"] == 3:
            raise ValueError("no\x1b[0m")
        return row["a"]

    bad: list[str] = []
    assert len(list(good_rows([(f"f:{n}", {"a": n}) for n in range(200)], bad, read))) == 199
    check_bad(bad, 199)
    assert "rows left out: 1, the first: f:3: no" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"1 of 3 rows cannot be read, more than 1%"):
        check_bad(bad, 2)


NESTED = "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(12))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("about", [f"{NESTED}\nconfigs: *a11", "configs: &a [*a]", "configs: " + "[" * 9_999])
def test_a_description_that_stands_for_more_than_it_says_is_refused(tmp_path: Path, about: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{about}\n---\n")
    (tmp_path / "train.csv").write_text("messages\n")
    with pytest.raises(ValueError, match="not YAML without aliases") as caught:
        open_table(str(tmp_path), tmp_path, name=None, split="train", revision=None)
    assert "\n" not in str(caught.value)


class Builder:
    """A data set of the hub, as ``datasets`` has found its files."""

    def __init__(self, *files: str) -> None:
        self.name = "parquet"
        self.config: Any = SimpleNamespace(data_files={"train": list(files)} if files else None)

    def download_and_prepare(self) -> None: ...

    def as_dataset(self, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"split": split}])


def test_a_data_set_of_the_hub_names_no_file_outside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*files: str) -> Table:
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder(*files))
        return open_table("some/data", tmp_path, name=None, split="train", revision=None)

    own = "hf://datasets/some/data@main/train.csv"
    for files in ((), (own,), (own, f"zip://a.csv::{own}")):
        assert opened(*files).get(0) == {"split": "train"}
    for file in ("/etc/passwd", "hf://datasets/other/data@main/x.csv", "https://x.y/z.csv", "zip://a.csv::/home/a.zip"):
        with pytest.raises(ValueError, match=r"some/data: cannot be read .*README names '.*', which is not in it"):
            opened(own, file)


@pytest.mark.parametrize(
    ("kind", "lines", "row"),
    [(json_module.JsonConfig, '{"a": "1"}\n{broken\n{"a": "2"}\n', 2), (csv_module.CsvConfig, "a\n1\n2,3\n2\n", 3)],
)
def test_a_bad_row_of_a_data_set_of_the_hub_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, lines: str, row: int
) -> None:
    builder = Builder("hf://datasets/some/data@main/data/train.x")
    named, builder.config, builder.name = builder.config.data_files, kind(), kind.__name__[:-6].lower()
    builder.config.data_files = named
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda _, files: [str(tmp_path / "blob") for _ in files])
    (tmp_path / "blob").write_text(lines)
    table = open_table("some/data", tmp_path, name=None, split="train", revision=None)
    assert (table.get(0), table.get(2), len(table)) == ({"a": "1"}, {"a": "2"}, 3)
    with pytest.raises(ValueError, match=rf"^some/data/data/train\.x:{row}: "):
        table.get(1)
    builder.config.features = datasets.Features({"a": datasets.Value("string")})  # what only the library knows
    assert open_table("some/data", tmp_path, name=None, split="train", revision=None).get(0) == {"split": "train"}


@pytest.mark.parametrize("name", ["train.unknown", "{folder}.py", "train.csv"])
def test_a_folder_that_the_library_cannot_read_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name.format(folder=tmp_path.name)).write_bytes(b"" if "csv" not in name else b"\xff\x00\n\x01,\x02\n")
    with pytest.raises(ValueError, match="cannot be read as a data set, split 'train'"):
        open_table(str(tmp_path), tmp_path, name=None, split="train", revision=None)


@pytest.mark.parametrize("before", ["", "\n \n", "---\nabout: a---b", "\r\n"])
@pytest.mark.parametrize("files", ["../secret.jsonl", "/etc/passwd", "https://x.y/z.jsonl"])
def test_a_data_folder_names_no_file_outside_it(tmp_path: Path, files: str, before: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"messages": []}\n')
    about = f"\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {files}\n---\n"
    (folder / "README.md").write_text((before if "---" in before else f"{before}---") + about, newline="")
    with pytest.raises(ValueError, match="hidden or not in its folder"):
        open_table(str(folder), tmp_path, name=None, split="train", revision=None)
    (folder / "README.md").unlink()
    (folder / "other.json").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ValueError, match="outside its folder"):
        open_table(str(folder), tmp_path, name=None, split="train", revision=None)


@pytest.mark.timeout(60)
def test_a_row_of_ten_million_spaces_is_left_out_by_every_reader(chain, tmp_path: Path) -> None:
    talks = [json.loads(line) for line in (chain.root / "corpus.jsonl").read_text().splitlines()]
    spaces, path = " " * 10_000_000, tmp_path / "rows.jsonl"
    answer = {"messages": [TURN, {"role": "assistant", "content": spaces}]}
    thought = {"messages": [TURN | {"reasoning_content": spaces}, {"role": "assistant", "content": "x"}]}
    for row in (answer, thought, {**talks[0], "tools": [spaces]}):
        path.write_text("".join(json.dumps(one) + "\n" for one in [*(talks * 200)[:150], row]))
        mixture = open_mixture([str(path)])
        assert [mixture.error(number) for number in range(150)] == [""] * 150
        assert f"rows.jsonl:151: messages of more than {LONGEST_TEXT:,} characters" in mixture.error(150)
        tokenizer = load_tokenizer(chain.root / "student")
        if "tools" not in row:
            assert len(read_messages(path)) > 0
            assert len(read_samples([path])) >= 150
        assert len(read_prompts(path, tokenizer)) == 150
    path.write_text(spaces)
    with pytest.raises(ValueError, match=r"rows\.txt: a text of more than"):
        read_samples([path.rename(tmp_path / "rows.txt")])


def test_what_is_no_file_of_rows_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tide.tables.table.HOPELESS", 10)
    monkeypatch.setattr(formats, "_LONGEST", 4 * formats.ROW_BYTES)
    monkeypatch.setattr("megatron_tide.tables.table._KEPT", 3)
    lines, hole = tmp_path / "lines.jsonl", tmp_path / "hole.jsonl"
    lines.write_text("x\n" * 50)
    bad: list[str] = []
    with pytest.raises(ValueError, match=r"lines.jsonl:11: not valid JSON"):
        list(read_rows(lines, bad))
    with pytest.raises(ValueError, match=r"lines.jsonl:11: not valid JSON"):
        opened(lines)
    assert [bool(reason) for reason in bad] == [True] * 3 + [False] * 7
    lines.write_text("{}\n" + "x\n" * 50)
    assert len(list(read_rows(lines, bad))) == 1
    assert len(bad) == 60
    with hole.open("wb") as file:
        file.write(b"{}\n")
        file.truncate(50 << 30)
    with pytest.raises(ValueError, match=r"hole.jsonl:2: a row of more than"):
        list(read_rows(hole, bad))
    with pytest.raises(ValueError, match="not a Parquet file"):
        open_table(str(hole.rename(tmp_path / "hole.parquet")), tmp_path, name=None, split="train", revision=None)
