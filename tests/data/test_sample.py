"""A sample of a mixture, as the file a bridge is measured on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_tide.bridge.samples import read_samples
from tests.data.conftest import conversation, write_jsonl
from tests.support.commands import command

main = command("sample")


def test_a_sample_holds_whole_conversations_of_every_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": conversation(n), "name": name} for n in range(100)])
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 0.5}]}))
    for out in ("one", "two"):
        assert main(["--data", str(mixture), "--out", str(tmp_path / f"{out}.jsonl"), "--limit", "40"]) == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").open()]
    assert len(rows) == 40
    assert all(row["messages"] == conversation(row["id"]) for row in rows if row["id"] < 100)
    assert any(row["id"] >= 100 for row in rows)
    assert read_samples([tmp_path / "one.jsonl"]) == [row["messages"][-1]["content"] for row in rows]


def test_rows_that_cannot_be_read_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversation(n)} for n in range(200)])
    path.write_text(path.read_text() + "{oops\n")
    assert main(["--data", str(path), "--out", str(tmp_path / "out.jsonl"), "--limit", "1000"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 200
    assert f"skipped: {path}:201: not valid JSON" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversation(1)}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists with other content"):
        main(["--data", str(path), "--out", str(path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"), [(["--limit", "0"], "--limit 0: must be at least 1"), (["--out", "x.json"], "must end in")]
)
def test_mistakes_are_refused(tmp_path: Path, flags: list[str], words: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": conversation(1)}])
    with pytest.raises(ValueError, match=words):
        main(["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl"), *flags])


def test_a_sample_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n'))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: not UTF-8 \(at byte 1\); give text, \.jsonl or \.parquet"):
        read_samples([path])
    path.write_bytes(b"\xef\xbb\xbfone text")
    assert read_samples([path]) == ["one text"]
