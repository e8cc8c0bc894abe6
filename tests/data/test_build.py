"""One shard: every row counted, those without a sample by their reason, the others in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tide.bridge import TEXTS_AT_ONCE
from megatron_tide.data.build import TOO_LONG, UNREADABLE, PrepareJob, build_shard
from megatron_tide.data.encode import REFUSED
from megatron_tide.data.shard import read_shard
from megatron_tide.data.sources import open_mixture
from tests.data.conftest import Pair, conversation

ROWS = 2 * TEXTS_AT_ONCE + 5


@pytest.mark.parametrize("two_sided", [True, False])
def test_rows_without_a_sample_are_counted_and_the_others_stay_in_order(
    pair: Pair, tmp_path: Path, two_sided: bool
) -> None:
    rows = [{"messages": conversation(number)} for number in range(ROWS)]
    without = {1: "x" * 3000, 2: "abc\ud800", 3: "abcdef\ud800", TEXTS_AT_ONCE + 3: "a\ud800"}
    for place, response in without.items():
        rows[place]["messages"][-1]["content"] = response
    rows[6] = {"messages": "no list"}
    # Half a surrogate pair has no UTF-8; JSON's own escape can say it.
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": "rows.jsonl", "max_chars": 2000}]}))
    encoder = pair.encoder() if two_sided else pair.student_only()
    job = PrepareJob(mixture=open_mixture([str(mixture)]), encoder=encoder, shard_rows=ROWS, out=tmp_path, settings={})
    build_shard(job, 0)
    shard = read_shard(job.path(0))
    assert shard.record["totals"]["read"] == ROWS
    assert shard.record["dropped"] == {TOO_LONG: 1, REFUSED: 3, UNREADABLE: 1}
    assert shard.record["unreadable"] == [6]
    assert "at character 3," in shard.record["example"]  # of the first refused row
    assert shard.arrays["key"].tolist() == [number for number in range(ROWS) if number not in {*without, 6}]


def test_a_shard_that_32_bit_offsets_cannot_hold_is_refused_before_the_work(pair: Pair, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": conversation(1)}) + "\n")
    mixture = open_mixture([str(rows)])
    most = (2**31 - 1) // 128  # the longer side's length
    PrepareJob(mixture=mixture, encoder=pair.encoder(), shard_rows=most, out=tmp_path, settings={})
    with pytest.raises(ValueError, match=f"--shard-rows {most + 1}: .* holds at most {most}"):
        PrepareJob(mixture=mixture, encoder=pair.encoder(), shard_rows=most + 1, out=tmp_path, settings={})
