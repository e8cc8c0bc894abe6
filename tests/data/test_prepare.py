"""Preparing: the same bytes whoever builds them and however often they are stopped, and one clear line for mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import datasets
import pytest

from megatron_tide.data import PreparedData
from megatron_tide.data.encode import Encoded
from megatron_tide.data.shard import shard_name
from megatron_tide.files import fingerprint, write_json
from tests.data.conftest import Pair, conversation, encode, write_jsonl
from tests.data.preparing import LENGTHS, RUN, Chats, content_of, flags_of, main, prepared


def test_a_prepared_folder_holds_what_the_settings_say(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    data = prepared(pair, chats(50), tmp_path / "out")
    data.check(student=pair.student.fingerprint, teacher=pair.teacher.fingerprint, bridge=pair.bridge.fingerprint)
    counts = data.manifest["counts"]
    assert counts["read"] == 50
    assert counts["kept"] == len(data) == 50 - sum(counts["dropped"].values())
    assert 0 < counts["truncated"] < 50
    assert data.manifest["coverage"] == 1.0
    assert [entry["rows"] for entry in data.manifest["shards"]] == [16, 16, 16, 2]
    assert data.manifest["student"]["mask_id"] == pair.student.mask_id
    assert data.manifest["tokens"]["student"] == int(data.stats.student_length.sum())
    encoder = pair.encoder()
    for i in range(len(data)):
        encoded = encode(encoder, conversation(int(data.stats.keys[i])))
        assert isinstance(encoded, Encoded)
        assert encoded.sample.student.ids.tolist() == data.sample(i).student.ids.tolist()


@pytest.mark.parametrize(
    ("stated", "flags", "block"), [(None, [], 32), (16, [], 16), (16, ["--student-block", "4"], 4)]
)
def test_the_block_size_is_the_flags_or_the_students_own(
    pair: Pair, chats: Chats, tmp_path: Path, stated: int | None, flags: list[str], block: int
) -> None:
    student = tmp_path / "student"
    shutil.copytree(pair.flags()[1], student)
    (student / "config.json").write_text(json.dumps({"block_size": stated}))
    where = ["--data", str(chats(4)), "--student", str(student), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*where, *flags]) == 0
    assert PreparedData.open(tmp_path / "out").manifest["student"]["block"] == block


def test_the_teachers_block_size_is_its_own(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    shutil.copytree(pair.student_path, student)
    shutil.copytree(pair.teacher_path, teacher)
    (student / "config.json").write_text(json.dumps({"block_size": 16}))
    (teacher / "config.json").write_text(json.dumps({"block_size": 8}))
    pair.bridge.save(tmp_path / "bridge")
    where = ["--data", str(chats(4)), "--student", str(student), "--teacher", str(teacher), "--workers", "1"]
    assert main([*where, "--bridge", str(tmp_path / "bridge"), "--out", str(tmp_path / "out")]) == 0
    manifest = PreparedData.open(tmp_path / "out").manifest
    assert (manifest["student"]["block"], manifest["teacher"]["block"]) == (16, 8)


def test_a_block_size_that_is_no_number_is_refused(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    shutil.copytree(pair.flags()[1], tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text('{"block_size": "all"}')
    with pytest.raises(ValueError, match=r"config\.json: block_size is 'all', not a number of tokens"):
        main(["--data", str(chats(4)), "--student", str(tmp_path / "student"), "--out", str(tmp_path / "out")])


def test_a_prepared_folder_is_a_data_set(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    data = prepared(pair, chats(50), tmp_path / "out")
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["key"][:] == data.stats.keys.tolist()
    for i in (0, 20, len(data) - 1):
        assert table[i]["student_ids"] == data.sample(i).student.ids.tolist()
        assert table[i]["teacher_chunk"] == data.sample(i).teacher.chunk.tolist()


def test_a_few_unreadable_rows_are_left_out_and_named(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"messages": conversation(number % 9)}) for number in range(250)]
    lines[100], lines[200] = "{oops", json.dumps({"text": "no messages"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = prepared(pair, path, tmp_path / "out")
    said = capsys.readouterr().err
    assert f"skipped: {path}:101: not valid JSON" in said
    assert f"skipped: {path}:201: no column 'messages'" in said
    assert data.manifest["counts"]["dropped"]["cannot be read"] == 2
    assert data.manifest["unreadable"] == [100, 200]
    assert set(range(250)) - set(data.stats.keys.tolist()) == {100, 200}
    before = content_of(tmp_path / "out")
    (tmp_path / "out" / shard_name(100 // 16)).unlink()
    prepared(pair, path.rename(tmp_path / "renamed.jsonl"), tmp_path / "out")
    assert content_of(tmp_path / "out") == before


def test_one_process_and_two_give_the_same_bytes(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    path = chats(70)
    prepared(pair, path, tmp_path / "one")
    prepared(pair, path, tmp_path / "two", "--workers", "2")
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_one_sided_data_need_the_student_alone(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    flags = ["--data", str(chats(20)), "--student", str(pair.student_path), "--out", str(tmp_path / "out")]
    flags += ["--workers", "1"]
    with pytest.raises(ValueError, match="--teacher-length applies to data for student and teacher"):
        main([*flags, *LENGTHS])
    assert main([*flags, "--student-length", "64", "--student-block", "8"]) == 0
    data = PreparedData.open(tmp_path / "out")
    assert data.student_only
    assert data.manifest["coverage"] is None
    data.check(student=pair.student.fingerprint)


def test_rows_without_a_response_are_counted_and_dropped(pair: Pair, tmp_path: Path) -> None:
    user, long = {"role": "user", "content": "Hi"}, {"role": "user", "content": "word " * 200}
    answer = {"role": "assistant", "content": "print(1)"}
    conversations = {
        "no assistant turn": [user],
        "nothing before the response": [answer],
        "empty response": [user, answer | {"content": " \n"}],
        "no response chunk fits": [long, answer],
        "refused by a tokenizer or template": [{"role": "tool", "content": "x"}, user, answer | {"content": "\ud800"}],
        "more characters than max_chars": [user, answer | {"content": "x" * 3000}],
        "kept": [user, answer],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations.values()))
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": "rows.jsonl", "max_chars": 2000}]}))
    data = prepared(pair, mixture, tmp_path / "out")
    assert data.manifest["counts"]["dropped"] == dict.fromkeys(conversations.keys() - {"kept"}, 1)
    assert len(data) == 1
    assert data.stats.keys.tolist() == [6]
    assert data.manifest["refused_example"]


def test_the_same_files_under_other_names_are_the_same_data(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    path, out = chats(20), tmp_path / "out"
    prepared(pair, path, out)
    before = content_of(out)
    shutil.copytree(pair.student_path, tmp_path / "copy")
    moved = path.rename(tmp_path / "moved.jsonl")
    assert main([*flags_of(pair, moved, out), "--student", str(tmp_path / "copy")]) == 0
    assert content_of(out) == before


def test_data_are_known_by_what_training_reads_of_them(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    path, out = chats(20), tmp_path / "out"
    before = prepared(pair, path, out)
    shutil.copytree(pair.student_path, tmp_path / "copy")
    shutil.copyfile(path, tmp_path / "copy.jsonl")
    again = prepared(pair, tmp_path / "copy.jsonl", tmp_path / "again", "--student", str(tmp_path / "copy"))
    assert again.manifest["fingerprint"] != before.manifest["fingerprint"], "it says what its sources were called"
    assert again.fingerprint == before.fingerprint
    for number, more in enumerate((["--student-length", "56"], ["--limit", "19"], ["--student-block", "4"])):
        assert prepared(pair, path, tmp_path / f"other-{number}", *more).fingerprint != before.fingerprint


def test_a_finished_folder_of_an_earlier_version_keeps_its_key(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    path, out = chats(20), tmp_path / "out"
    prepared(pair, path, out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["content"], manifest["fingerprint"]
    write_json(out / "manifest.json", {**manifest, "fingerprint": fingerprint(manifest)})
    before = content_of(out)
    assert prepared(pair, path, out).fingerprint == fingerprint(manifest)
    assert content_of(out) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--student-length", "72"], "with student.length = 64, now it is 72; pass --fresh"),
        (["--teacher-block", "32"], "with teacher.block = 16, now it is 32"),
        (["--limit", "10"], "with limit = None, now it is 10"),
        (["--shard-rows", "8"], "with shard_rows = 16, now it is 8"),
        (["--student-mask", "<|endoftext|>"], "with .*mask_id|not the student tokenizer that"),
    ],
)
def test_other_settings_are_refused_by_name(
    pair: Pair, chats: Chats, tmp_path: Path, more: list[str], words: str
) -> None:
    path, out = chats(20), tmp_path / "out"
    prepared(pair, path, out)
    before = content_of(out)
    with pytest.raises(ValueError, match=words):
        main(flags_of(pair, path, out, *more))
    assert content_of(out) == before


def test_another_filter_of_a_column_called_path_is_another_setting(pair: Pair, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "x + y"}]
    rows = [{"path": path, "messages": talk} for path in ("a.py", "b.py")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in ("a.py", "b.py"):
        source = {"path": "rows.jsonl", "filter": {"path": path}}
        (tmp_path / f"{path}.json").write_text(json.dumps({"sources": [source]}))
    prepared(pair, tmp_path / "a.py.json", tmp_path / "out")
    with pytest.raises(ValueError, match=r"with sources\[0\]\.filter\.path = a\.py, now it is b\.py"):
        main(flags_of(pair, tmp_path / "b.py.json", tmp_path / "out"))


def test_other_data_are_refused_and_fresh_starts_over(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(pair, chats(40), out)
    path = chats(20)
    with pytest.raises(ValueError, match=r"with sources\[0\].content .* --fresh"):
        main(flags_of(pair, path, out))
    data = prepared(pair, path, out, "--fresh")
    assert data.manifest["counts"]["read"] == 20
    prepared(pair, path, tmp_path / "new")
    assert content_of(out) == content_of(tmp_path / "new")


def test_a_folder_of_something_else_is_left_alone(pair: Pair, chats: Chats) -> None:
    before = content_of(pair.bridge_path)
    for more in ([], ["--fresh"]):
        with pytest.raises(ValueError, match=r"has a manifest\.json that is not of prepared data"):
            main(flags_of(pair, chats(5), pair.bridge_path, *more))
    assert content_of(pair.bridge_path) == before


@pytest.mark.parametrize("name", ["README.md", "shard-00000.arrow", "settings.json"])
def test_files_of_the_user_are_not_replaced(pair: Pair, chats: Chats, tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(ValueError, match="not of prepared data"):
        main(flags_of(pair, chats(5), out, "--fresh"))
    assert {file.name for file in out.iterdir()} == {name}
    assert (out / name).read_text() == "{}"


def test_notes_of_the_user_stay(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    out, path = tmp_path / "out", chats(10)
    prepared(pair, path, out)
    for name in ("README.md", "shard-notes.txt"):
        (out / name).write_text("mine")
    prepared(pair, path, out)
    prepared(pair, chats(5), out, "--fresh")
    assert [(out / name).read_text() for name in ("README.md", "shard-notes.txt")] == ["mine", "mine"]


def test_coverage_below_the_floor_stops(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"covers 1.0000 of the response bytes, less than --coverage-floor 1.5"):
        main(flags_of(pair, chats(5), tmp_path / "out", "--coverage-floor", "1.5"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_limit_takes_that_many_rows(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    data = prepared(pair, chats(100), tmp_path / "out", "--limit", "30")
    assert data.manifest["counts"]["read"] == 30
    assert max(data.stats.keys) >= 30


MISTAKES = [
    (["--data", "gone.jsonl"], r"gone\.jsonl: no such file or folder"),
    (["--data", "users.jsonl"], r"users\.jsonl: no row has an assistant turn"),
    (["--data", "long.jsonl"], r"long\.jsonl: all 2 rows were dropped: 2 no response chunk fits"),
    (["--data", "broken.jsonl"], r"broken\.jsonl:2: not valid JSON"),
    (["--data", "empty.jsonl"], r"empty\.jsonl: no row to read"),
    (["--student", "gone/tokenizer"], r"gone/tokenizer: "),
    (["--bridge", "gone"], r"gone: no such folder"),
    (["--student-length", "60"], r"length 60 is not a multiple of block 8.*use 56"),
    (["--student-mask", "<no such>"], r"<no such>"),
    (["--workers", "0"], r"--workers 0: must be at least 1"),
    (["--limit", "0"], r"--limit 0: must be at least 1"),
    (["--swap"], r"not the student tokenizer that the bridge was built for"),
]


@pytest.mark.parametrize(("more", "words"), MISTAKES)
def test_mistakes_give_one_line(pair: Pair, chats: Chats, tmp_path: Path, more: list[str], words: str) -> None:
    user = {"role": "user", "content": "word " * 300}
    write_jsonl(tmp_path / "users.jsonl", [{"messages": [user]}] * 2)
    write_jsonl(tmp_path / "long.jsonl", [{"messages": [user, {"role": "assistant", "content": "x"}]}] * 2)
    (tmp_path / "broken.jsonl").write_text(json.dumps({"messages": conversation(1)}) + "\n{\n")
    (tmp_path / "empty.jsonl").write_text("")
    if more == ["--swap"]:
        more = ["--student", str(pair.teacher_path), "--teacher", str(pair.student_path)]
    with pytest.raises(ValueError, match=words) as caught:
        main(flags_of(pair, chats(4), tmp_path / "out", *_inside(tmp_path, more)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def _inside(folder: Path, flags: list[str]) -> list[str]:
    return [flags[0], str(folder / flags[1])] if flags[0] == "--data" else flags


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_command_exits_with_2_and_no_traceback(pair: Pair, tmp_path: Path, workers: str) -> None:
    rows = [{"messages": conversation(n)} for n in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"messages": [{"role": "user"}, {"content": "x"}]}])
    command = [*RUN, *flags_of(pair, path, tmp_path / "out", "--workers", workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    reason = "message 1: role and content must be text; 1 of 41 rows cannot be read, more than 1%"
    assert done.stderr == f"error: {path}:41: {reason}\n"


def test_a_teacher_without_a_bridge_is_refused(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    flags = ["--data", str(chats(4)), "--student", str(pair.student_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--teacher and --bridge need each other"):
        main([*flags, "--teacher", str(pair.teacher_path)])
