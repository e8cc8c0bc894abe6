"""The bridge's commands, as a user runs them: build, inspect, train tokenizers. Mistakes cost one line and status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_tide import cli
from megatron_tide.bridge import Bridge, TextTokenizer, align_text, load_tokenizer
from megatron_tide.bridge.samples import read_samples
from megatron_tide.bridge.show import show, show_side
from tests.bridge.test_bridge import character_tokenizer
from tests.support.commands import command
from tests.support.tokenizers import TEXTS

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def conversation(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Write."}, {"role": "assistant", "content": text}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(conversation(text)) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def status(name: str, *arguments: object) -> int:
    """Exit status of a command run in this process, by the wrapper that every command goes through."""
    with pytest.raises(SystemExit) as caught:
        cli.run(command(name), [str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def assert_refused(capsys: Capture, reason: str) -> None:
    """Nothing on stdout that looks like success, one line on stderr with the reason."""
    output = capsys.readouterr()
    assert re.search(reason, output.err), output.err
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: ")


@pytest.fixture
def build(folders: Mapping[str, Path], data: Path, tmp_path: Path) -> list[object]:
    """A complete command line of the bridge builder."""
    pair = ["--student", folders["student"], "--teacher", folders["teacher"]]
    return [*pair, "--sample", data, "--out", tmp_path / "bridge"]


def test_build_then_skip_then_rebuild(capsys: Capture, build: list[object], tmp_path: Path) -> None:
    assert status("bridge", *build) == 0
    first = capsys.readouterr().out
    assert "bridge: built" in first
    assert "coverage: 1.0000 of bytes" in first
    written = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "bridge").iterdir()}
    assert status("bridge", *build) == 0
    assert "bridge: already done, skipped" in capsys.readouterr().out
    for name, (time, content) in written.items():
        assert (tmp_path / "bridge" / name).stat().st_mtime_ns == time
        assert (tmp_path / "bridge" / name).read_bytes() == content
    assert status("bridge", *build, "--fresh") == 0
    assert "bridge: built" in capsys.readouterr().out
    assert (tmp_path / "bridge" / "manifest.json").read_bytes() == written["manifest.json"][1]


def test_a_differing_bridge_is_not_overwritten(
    capsys: Capture, build: list[object], folders: Mapping[str, Path], data: Path, tmp_path: Path
) -> None:
    status("bridge", *build)
    before = (tmp_path / "bridge" / "manifest.json").read_bytes()
    capsys.readouterr()
    others = [*build]
    others[3] = folders["prefixed"]
    assert status("bridge", *others) == 2
    assert_refused(capsys, "contains a bridge of other tokenizers; pass --fresh")
    assert status("bridge", *build, "--sample-limit", 3) == 2
    assert_refused(capsys, "another sample; pass --fresh")
    assert (tmp_path / "bridge" / "manifest.json").read_bytes() == before
    assert status("bridge", *others, "--fresh") == 0
    assert (tmp_path / "bridge" / "manifest.json").read_bytes() != before
    (tmp_path / "bridge" / "manifest.json").write_text('{"shards": []}')  # of prepared data
    assert status("bridge", *others, "--fresh") == 2
    assert_refused(capsys, "manifest.json: not of a bridge, so it is not replaced")


def test_a_corrupt_bridge_is_not_taken_for_done(capsys: Capture, build: list[object], tmp_path: Path) -> None:
    status("bridge", *build)
    (tmp_path / "bridge" / "vocab_map.safetensors").unlink()
    capsys.readouterr()
    assert status("bridge", *build) == 2
    assert_refused(capsys, "build the bridge again with --fresh")
    assert status("bridge", *build, "--fresh") == 0


def test_coverage_floor_stops_and_writes_nothing(capsys: Capture, build: list[object], tmp_path: Path) -> None:
    character_tokenizer(tmp_path / "characters", "abcdefghijklmnopqrstuvw")
    build[1] = tmp_path / "characters"
    assert status("bridge", *build) == 2
    assert_refused(capsys, r"covers 0\.\d+ of the sample's bytes, less than 0.98")
    assert not (tmp_path / "bridge").exists()
    assert status("bridge", *build, "--coverage-floor", 0) == 0


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (1, "absent/tokenizer", "absent/tokenizer: no such local tokenizer, and not reachable on the hub"),
        (1, "./absent", "no such tokenizer"),
        (5, "absent.jsonl", "absent.jsonl"),
        ("--coverage-floor", 98, "--coverage-floor 98.0: must be between 0 and 1"),
        ("--sample-limit", 0, "must be at least 1"),
        ("--student-mask", "<|hole|>", "no token '<|hole|>' to use as the mask"),
    ],
)
def test_build_mistakes(capsys: Capture, build: list[object], place: int | str, value: object, reason: str) -> None:
    if isinstance(place, int):
        build[place] = value
    else:
        build += [place, value]
    assert status("bridge", *build) == 2
    assert_refused(capsys, re.escape(reason))


BROKEN_DATA = {
    "": "no assistant turn",
    '{"messages": [{"role": "user", "content": "x"}]}\n': "no assistant turn",
    '{"messages": []\n': ":1: not valid JSON",
    '{"text": "x"}\n{"messages": [{"content": "y"}]}\n': ":2: message 0: role and content must be text",
    '{"messages": [{"role": "assistant"}]}\n': "no assistant turn",
    '{"messages": [{"role": "assistant", "content": ["x"]}]}\n': ":1: message 0: role and content must be text",
    '{"messages": 3}\n': ":1: messages must be a list",
    '{"messages": null}\n': ":1: messages must be a list",
    '{"text": 3}\n': ":1: messages must be a list",
}


@pytest.mark.parametrize("content", BROKEN_DATA)
def test_broken_data(capsys: Capture, build: list[object], data: Path, content: str) -> None:
    data.write_text(content, encoding="utf-8")
    assert status("bridge", *build) == 2
    assert_refused(capsys, re.escape(BROKEN_DATA[content]))


def test_samples_of_all_kinds(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([conversation("first"), conversation("second")]), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "third"}\n' + json.dumps(conversation("fourth")), encoding="utf-8")
    (tmp_path / "notes.md").write_text("fifth", encoding="utf-8")
    assert read_samples([tmp_path, tmp_path / "notes.md"]) == ["first", "second", "third", "fourth", "fifth"]
    assert read_samples([tmp_path / "a.parquet"], limit=1) == ["first"]
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: not readable as Parquet"):
        read_samples([tmp_path])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["-m", "megatron_tide", "bridge"], ["tools/inspect_bridge.py", "x"], ["-m", "megatron_tide", "train-tokenizers"]],
    ids=["bridge", "inspect", "train"],
)
def test_from_a_shell(tmp_path: Path, words: list[str]) -> None:
    run = [sys.executable, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if words[0] == "-m" else {**os.environ}
    shown = subprocess.run([*run, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert "usage:" in shown.stdout
    lacking = ["--student", "absent/a", "--teacher", "absent/b"]
    lacking += ["--sample", "absent.jsonl", "--out", str(tmp_path / "out")] if "bridge" in words else []
    if "train-tokenizers" in words:
        lacking = ["--data", "absent.jsonl", "--student-out", str(tmp_path / "s"), "--teacher-out", str(tmp_path / "t")]
    failed = subprocess.run([*run, *lacking], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())


def test_inspect_shows_both_sides(capsys: Capture, folders: Mapping[str, Path], data: Path) -> None:
    pair = ["--student", folders["student"], "--teacher", folders["teacher"]]
    assert status("inspect", "def add\n\x1b[2J", *pair) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"\x1b" in shown
    bodies = re.findall(r"tokens:\n(.*?)\n(?=teacher|\d+ chunks)", shown, re.DOTALL)
    assert len(bodies) == 2
    spelled = [re.sub(r"[\[\]|]|\u23ce", "", body).replace("\u00b7", " ") for body in bodies]
    assert spelled[0] == spelled[1] == "def add\n\\x1b2J"
    assert bodies[0].count("[") == bodies[1].count("[")
    assert "coverage: 1.0000" in shown
    assert load_tokenizer(folders["student"]).fingerprint[:16] in shown
    assert status("inspect", "--data", data, "--limit", 2, "--no-color", *pair) == 0
    assert capsys.readouterr().out.count("student, ") == 2


def test_inspect_colours(tokenizers: Mapping[str, TextTokenizer]) -> None:
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    shown = show(student, teacher, align_text(student, teacher, "def add(x):\n    pass"), colour=True)
    rows = re.findall(r"tokens:\n(.*?)\n(?=teacher|\d+ chunks)", shown, re.DOTALL)
    # The sequence of colours, one a chunk, is the same on both sides; every line ends with the colours off.
    colours = [re.findall(r"\x1b\[30;4\dm", row.replace("\n\x1b[30;4", "\n")) for row in rows]
    assert colours[0] == colours[1]
    assert all(left != right for left, right in zip(colours[0], colours[0][1:]))
    assert all(line.endswith("\x1b[0m") for row in rows for line in row.split("\n"))
    unaligned = show_side(student, student.encode("a"), np.array([-2]), colour=True)
    assert unaligned.startswith("\x1b[97;41m")
    assert show_side(student, student.encode("a"), np.array([-2]), colour=False) == "~a~"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "either a text or --data"),
        (("x", "--data", "y"), "either"),
        (("--data", "no.jsonl"), r"no\.jsonl"),
        (("x", "--limit", "2"), "--limit applies to --data"),
    ],
)
def test_inspect_mistakes(
    capsys: Capture, folders: Mapping[str, Path], arguments: tuple[str, ...], reason: str
) -> None:
    pair = ["--student", folders["student"], "--teacher", folders["teacher"]]
    assert status("inspect", *arguments, *pair) == 2
    assert_refused(capsys, reason)


@pytest.fixture
def train(data: Path, tmp_path: Path) -> list[object]:
    folders = ["--student-out", tmp_path / "s", "--teacher-out", tmp_path / "t"]
    return ["--data", data, *folders, "--student-vocab", 300, "--teacher-vocab", 340]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_training_is_deterministic_skips_and_refuses(capsys: Capture, train: list[object], tmp_path: Path) -> None:
    assert status("train-tokenizers", *train) == 0
    assert capsys.readouterr().out.count(": trained") == 2
    before = contents(tmp_path / "s"), contents(tmp_path / "t")
    assert load_tokenizer(tmp_path / "s").vocab_size == 300
    assert load_tokenizer(tmp_path / "t").vocab_size == 340
    bridge = Bridge.build(load_tokenizer(tmp_path / "s"), load_tokenizer(tmp_path / "t"), TEXTS)
    assert bridge.coverage == 1.0
    assert status("train-tokenizers", *train) == 0
    assert capsys.readouterr().out.count("done, skipped") == 2
    assert status("train-tokenizers", *train, "--fresh") == 0
    assert (contents(tmp_path / "s"), contents(tmp_path / "t")) == before
    (tmp_path / "s" / "notes.md").touch()
    assert status("train-tokenizers", *train, "--fresh") == 2
    assert_refused(capsys, "has notes.md, which this tool does not write; move it")
    (tmp_path / "s" / "notes.md").unlink()
    capsys.readouterr()
    assert status("train-tokenizers", *train, "--student-vocab", 310) == 2
    assert_refused(capsys, "contains a tokenizer of other settings; pass --fresh")
    assert contents(tmp_path / "s") == before[0]


def test_training_needs_two_folders_and_sizes_that_are_possible(capsys: Capture, train: list[object]) -> None:
    assert status("train-tokenizers", *train, "--teacher-out", train[train.index("--student-out") + 1]) == 2
    assert_refused(capsys, "the folder of both tokenizers")
    assert status("train-tokenizers", *train, "--teacher-vocab", 2**31 - 1) == 2
    assert_refused(capsys, "--teacher-vocab 2147483647: must be between 1 and")


def test_training_never_deletes_what_it_did_not_make(capsys: Capture, train: list[object], tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert status("train-tokenizers", *train, "--fresh") == 2
    assert_refused(capsys, ": not made by this tool")
    assert (tmp_path / "s" / "thesis.tex").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--student-vocab", 259), "needs at least 260"),
        (("--teacher-vocab", 100), "SentencePiece cannot train 100 pieces"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_training_mistakes(
    capsys: Capture, train: list[object], arguments: tuple[str, object], reason: str, tmp_path: Path
) -> None:
    assert status("train-tokenizers", *train, *arguments) == 2
    assert_refused(capsys, reason)
    assert not list(tmp_path.glob(".tide-tmp-*"))


def test_training_on_data_without_messages(capsys: Capture, train: list[object], data: Path) -> None:
    for content, reason in (('{"text": "x"}\n', ":1: messages must be a list"), ("", ": no messages to train on")):
        data.write_text(content, encoding="utf-8")
        assert status("train-tokenizers", *train) == 2
        assert_refused(capsys, reason)


def test_a_mask_may_be_an_id_beyond_the_vocabulary(tmp_path):
    from megatron_tide.bridge import load_tokenizer
    from tests.support.tokenizers import TEXTS, train_byte_bpe

    folder = train_byte_bpe(tmp_path / "student", TEXTS, 320)
    tokenizer = load_tokenizer(folder)
    beyond = load_tokenizer(folder, mask_token=str(tokenizer.vocab_size + 3))
    assert beyond.mask_id == tokenizer.vocab_size + 3
    assert beyond.fingerprint == tokenizer.fingerprint
    ordinary = int(tokenizer.encode("return")[0])
    with pytest.raises(ValueError, match="is a text token"):
        load_tokenizer(folder, mask_token=str(ordinary))
