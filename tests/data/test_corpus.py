"""The docstring -> code corpus: large enough, exact, split by function or by file, the same every time."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from megatron_tide.data.corpus import Pair, by_file, by_function, collect, split, write_corpus
from megatron_tide.data.near_duplicates import SIMILAR, code_tokens, shingles

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
MODULE = '''\
class Stack:
    def push(self, item):
        """Put an item on top."""
        # the list's end is the top
        self.items.append(item)

    async def pull(self):
        """Wait for an item."""

        return await self.queue.get()

def bare(): return 1

def documented_only():
    """No body."""

def odd():
    """A string at the margin."""
    return """
margin"""
'''


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return collect(LIBRARY)[0]


@pytest.fixture(scope="module")
def splits(pairs: list[Pair]) -> dict[str, list[Pair]]:
    return split(pairs, by_function(pairs))


def test_the_library_gives_over_5000_pairs_that_are_code(pairs: list[Pair]) -> None:
    assert len(pairs) > 5000
    assert len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert ast.parse(pair.body).body
        assert '"' in pair.instruction or "'" in pair.instruction  # the docstring stands in it


@pytest.mark.parametrize("by", [by_file, by_function])
def test_held_out_splits_have_their_share_and_do_not_depend_on_the_order_of_the_pairs(pairs: list[Pair], by) -> None:
    splits = split(pairs, by(pairs))
    assert sum(map(len, splits.values())) == len(pairs)
    for name in ("validation", "test"):
        assert 0.045 < len(splits[name]) / len(pairs) < 0.06
    assert split(pairs[::-1], by(pairs[::-1])) == splits


def test_by_file_no_file_is_in_two_splits(pairs: list[Pair]) -> None:
    files = {name: {pair.file for pair in members} for name, members in split(pairs, by_file(pairs)).items()}
    assert not files["train"] & files["validation"]
    assert not files["train"] & files["test"]
    assert not files["validation"] & files["test"]


def test_by_function_no_body_is_equal_or_nearly_one_of_another_split(splits: dict[str, list[Pair]]) -> None:
    """Pair by pair, where the split itself looks near-equal ones up in an index."""
    seen: dict[str, str] = {}
    for name, members in splits.items():
        for pair in members:
            assert seen.setdefault(" ".join(pair.body.split()), name) == name, pair.id
    found = {name: [shingles(code_tokens(pair.body)) for pair in members] for name, members in splits.items()}
    for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        for mine in found[one]:
            near = (theirs for theirs in found[other] if SIMILAR * len(mine) <= len(theirs) <= len(mine) / SIMILAR)
            assert all(len(mine & theirs) < SIMILAR * len(mine | theirs) for theirs in near)


def test_source_is_taken_exactly_and_dedented(tmp_path: Path) -> None:
    (tmp_path / "stack.py").write_text(MODULE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_stack.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (")
    pairs, left_out = collect(tmp_path)
    task = "Write the body of this Python method of the class Stack.\n\n"
    assert [(pair.instruction, pair.body) for pair in pairs] == [
        (
            task + 'def push(self, item):\n    """Put an item on top."""',
            "# the list's end is the top\nself.items.append(item)",
        ),
        (task + 'async def pull(self):\n    """Wait for an item."""', "return await self.queue.get()"),
    ]
    assert left_out == {"no docstring": 1, "no body": 1, "not dedentable": 1, "unreadable file": 1}


def test_copied_code_counts_once_and_short_code_once_an_instruction(tmp_path: Path) -> None:
    long = "return " + " + ".join(f"value_{n}" for n in range(12))
    function = 'def {}({}):\n    """Add."""\n    {}\n'
    (tmp_path / "a.py").write_text(function.format("f", "x", long) + function.format("g", "x", "return x"))
    (tmp_path / "b.py").write_text(function.format("h", "y", long) + function.format("g", "x", "return x"))
    (tmp_path / "c.py").write_text(function.format("g", "y, x", "return x"))
    pairs, left_out = collect(tmp_path)
    assert [pair.id for pair in pairs] == ["a.py:1:f", "a.py:4:g", "c.py:1:g"]
    assert left_out["duplicate"] == 2


LONG = """\
total = {start}
for {item} in self.{source}:
    if {item}.size > limit:  # {remark}
        total += {item}.size * {factor}
return total
"""
PLANTED = {
    "equal": LONG.format(start=0, item="item", source="items", factor=2, remark="large"),
    "another layout": LONG.format(start=0, item="item", source="items", factor=2, remark="big").replace("    ", "  "),
    "other literals": LONG.format(start=1.5, item="item", source="items", factor=300, remark="large"),
    "other names": LONG.format(start=0, item="entry", source="entries", factor=2, remark="large"),
    "a statement more": "check(self)\n" + LONG.format(start=0, item="item", source="items", factor=2, remark="large"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_an_equal_and_a_near_equal_body_are_in_one_split(tmp_path: Path, what: str) -> None:
    """Whatever the name of the function, which decides its split: with each of many names, the copy is beside it."""
    library = _library(tmp_path)
    template = 'def {}(self, limit):\n    """Sum {}."""\n{}\n'
    found = set()
    for number in range(60):
        bodies = (PLANTED["equal"], PLANTED[what])
        copies = [template.format(f"sum_{number}", n, textwrap.indent(body, "    ")) for n, body in enumerate(bodies)]
        (library / "planted_a.py").write_text(copies[0])
        (library / "planted_b.py").write_text(copies[1])
        pairs = collect(library)[0]
        splits = split(pairs, by_function(pairs))
        where = [name for name, members in splits.items() for pair in members if pair.file.startswith("planted")]
        assert len(where) == (1 if what == "equal" else 2)  # an equal long body counts once
        assert len(set(where)) == 1
        found |= set(where)
    assert found == {"train", "validation", "test"}


def test_short_equal_bodies_are_in_one_split_and_a_common_phrase_in_train(tmp_path: Path) -> None:
    library = _library(tmp_path)
    for copies, where in ((2, {"train", "validation", "test"}), (9, {"train"})):
        found = set()
        for number in range(60):
            functions = (f'def f_{number}(a{n}):\n    """Nothing."""\n    pass\n' for n in range(copies))
            (library / "planted.py").write_text("".join(functions))
            pairs = collect(library)[0]
            splits = split(pairs, by_function(pairs))
            names = {name for name, members in splits.items() for pair in members if pair.file == "planted.py"}
            assert len(names) == 1
            found |= names
        assert found == where


def _library(folder: Path) -> Path:
    for number in range(20):
        names = [f"sum_{number}_{n}" for n in range(5)]
        body = "".join(f'def f(x):\n    """Add {n}."""\n    {n} = x + 1\n    return {n}\n' for n in names)
        (folder / f"module_{number}.py").write_text(body)
    return folder


def test_written_files_agree_with_the_manifest_and_come_out_the_same_again(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = _library(tmp_path / "lib")
    first = write_corpus(tmp_path / "one", library)
    assert write_corpus(tmp_path / "two", library) == first
    rows = {name: [json.loads(line) for line in (tmp_path / "one" / name).open()] for name in first["files"]}
    assert {name: len(content) for name, content in rows.items()} == {
        name: entry["pairs"] for name, entry in first["files"].items()
    }
    tenth, train = rows["train_tenth.jsonl"], rows["train.jsonl"]
    assert len(tenth) == -(-len(train) // 10)
    assert [row["id"] for row in tenth] == [row["id"] for row in train][: len(tenth)]
    assert Counter(len(row["messages"]) for row in train) == {2: len(train)}
    assert train == sorted(train, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())


def test_a_finished_corpus_is_kept_and_a_corrupt_one_refused(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    out, library = tmp_path / "out", _library(tmp_path / "lib")
    manifest = write_corpus(out, library)
    (library / "module_0.py").unlink()
    assert write_corpus(out, library) == manifest
    with pytest.raises(ValueError, match=r"split by function, not by file; pass --fresh"):
        write_corpus(out, library, by="file")
    assert write_corpus(out, library, fresh=True) != manifest
    with (out / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"train\.jsonl: missing or changed.*--fresh"):
        write_corpus(out, library)
    old = {key: value for key, value in write_corpus(out, library, fresh=True).items() if key != "split"}
    (out / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"split by file, not by function; pass --fresh"):
        write_corpus(out, library)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not the manifest of a corpus"):
        write_corpus(out, library)


def test_files_of_the_user_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = _library(tmp_path / "lib")
    for name, content in (("train.jsonl", "hours of work"), ("manifest.json", "{}")):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(ValueError, match="not of a corpus"):
            write_corpus(out, library, fresh=True)
        assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, content)]
    made = tmp_path / "made"
    write_corpus(made, library)
    (made / "manifest.json").unlink()  # as a killed run leaves it
    write_corpus(made, library)


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no function with a docstring"):
        write_corpus(tmp_path / "out", tmp_path)


def test_the_command_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "megatron_tide", "corpus", "--out", str(tmp_path / "file" / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
