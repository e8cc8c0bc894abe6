"""A corpus that every machine has: docstring -> code pairs of the running interpreter's own standard library.

    files of the library -> functions and methods with a docstring and a body -> chat messages -> splits

The user's message is the ``def`` lines and the docstring as in the source, after one line of instruction;
the assistant's is the rest of the body, dedented. Rows are sorted by a hash of their id, so any prefix of a file is a
random sample of it.

The splits are by function, because the teacher knows the library and a student of a tenth does not: that difference is
what distillation can pass on. Equal and near-equal bodies (``near_duplicates``) are in one split, and more than
``_LARGEST_GROUP`` of them in train, so that no phrase makes up a held-out split. By file, nothing of a test file was
seen in training, and the teacher knows hardly more of it than the student.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.bounds import short
from megatron_tide.choices import CORPUS_SPLITS
from megatron_tide.data import near_duplicates
from megatron_tide.files import atomic_write, read_json, read_whole, refuse_other, sha256_file, write_json

SPLITS = ("train", "validation", "test")
TENTH = "train_tenth"
MANIFEST = "manifest.json"
_HELD_OUT = 0.05  # the share of all pairs that validation and test each get
_OVERSHOOT = 1.1  # a group that would push a held-out split above this multiple of its share goes to train
_LARGEST_GROUP = 4
_SHORT = 80  # characters of code below which equal code is a common phrase rather than a copy
_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests", "idle_test"})  # assertions, not implementations of a docstring
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """One docstring -> code pair. ``file`` is relative to the library; ``id`` is ``file:line:qualified name``."""

    id: str
    file: str
    instruction: str
    body: str

    def row(self) -> str:
        """The pair as one line of a ``messages`` data set."""
        messages = [{"role": "user", "content": self.instruction}, {"role": "assistant", "content": self.body}]
        return json.dumps({"id": self.id, "file": self.file, "messages": messages}, ensure_ascii=False) + "\n"


def collect(library: Path) -> tuple[list[Pair], Counter[str]]:
    """All pairs of the Python files under ``library``, and the number of skipped functions by reason.

    The same code (aliases, copied modules) counts once, in any file: it must not be in two splits. Short code,
    which many functions share without being copies, counts once for every instruction.
    """
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if (_FOREIGN | _TESTS) & set(relative.parts) or not path.is_file():
            continue
        for pair in _pairs_of_file(path, relative.as_posix(), left_out):
            same = pair.body if len(pair.body) >= _SHORT else f"{pair.instruction}\n{pair.body}"
            if same in seen:
                left_out["duplicate"] += 1
                continue
            seen.add(same)
            pairs.append(pair)
    return pairs, left_out


@dataclass(frozen=True)
class Groups:
    """``of``: for each pair the name of its group; a group is in one split. ``about``: for the manifest."""

    of: list[str]
    about: dict[str, Any]


def by_file(pairs: Sequence[Pair]) -> Groups:
    """A group is a file's pairs."""
    return Groups([pair.file for pair in pairs], {"why": "nothing of a test file was seen in training"})


def by_function(pairs: Sequence[Pair]) -> Groups:
    """A group is a function with those of near-equal bodies; large groups have no name, which keeps them in train."""
    places = sorted(range(len(pairs)), key=lambda place: pairs[place].id)
    found = near_duplicates.near_duplicates([pairs[place].body for place in places])
    sizes, groups = Counter(found), [""] * len(pairs)
    for place, first in zip(places, found):
        groups[place] = pairs[places[first]].id if sizes[first] <= _LARGEST_GROUP else ""
    about = {
        "why": "the teacher knows the library and a student trained on a tenth does not, so there is something to pass "
        "on; equal and near-equal bodies are in one split",
        "similar": near_duplicates.SIMILAR,
        "shingle_tokens": near_duplicates.SHINGLE,
        "renamed_from_tokens": near_duplicates.RENAMED,
        "largest_held_out_group": _LARGEST_GROUP,
        "groups": len(sizes),
        "pairs_in_train_for_their_group": groups.count(""),
    }
    return Groups(groups, about)


def split(pairs: list[Pair], groups: Groups) -> dict[str, list[Pair]]:
    """Assign whole groups to the splits in the order of a hash of their names: test, then validation, then train."""
    sizes = Counter(groups.of)
    share = _HELD_OUT * len(pairs)
    split_of: dict[str, str] = {"": "train"}
    filled = dict.fromkeys(SPLITS, 0)
    for group in sorted(sizes.keys() - {""}, key=_hash):
        fits = (name for name in ("test", "validation") if filled[name] < share)
        name = next((name for name in fits if filled[name] + sizes[group] <= _OVERSHOOT * share), "train")
        split_of[group] = name
        filled[name] += sizes[group]
    splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for group, pair in sorted(zip(groups.of, pairs), key=lambda both: _hash(both[1].id)):
        splits[split_of[group]].append(pair)
    return splits


def write_corpus(out: Path, library: Path, by: str = "function", fresh: bool = False) -> dict[str, Any]:
    """Write the corpus of ``library`` to the folder ``out`` and return its manifest. An existing corpus is kept.

    ``by``: what a split keeps together, a name of ``CORPUS_SPLITS``. ValueError when ``out`` contains the corpus of
    another interpreter or split otherwise, or a modified one, unless ``fresh``.
    """
    manifest_path = out / MANIFEST
    if manifest_path.exists() and not fresh:
        return _existing(manifest_path, by)
    refuse_other(manifest_path, "python", "a corpus")
    pairs, left_out = collect(library)
    if not pairs:
        raise ValueError(f"{library}: no function with a docstring found; this Python has no standard library sources")
    groups = CORPUS_SPLITS[by](pairs)
    splits = split(pairs, groups)
    splits[TENTH] = splits["train"][: -(-len(splits["train"]) // 10)]
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, members in splits.items():
        path, content = out / f"{name}.jsonl", "".join(pair.row() for pair in members).encode()
        if path.exists() and not manifest_path.exists() and read_whole(path) != content:  # a killed run leaves the same
            raise ValueError(f"{path}: exists and is not of a corpus; use another --out, or remove it")
        atomic_write(path, content)
        files[path.name] = {
            "pairs": len(members),
            "source_files": len({pair.file for pair in members}),
            "body_bytes": sum(len(pair.body.encode()) for pair in members),
            "sha256": sha256_file(path),
        }
    manifest = {
        "python": platform.python_version(),
        "split": {"by": by, **groups.about},
        "pairs": len(pairs),
        "left_out": left_out,
        "files": files,
    }
    write_json(manifest_path, manifest)
    return manifest


_MANIFEST = {"python": str, "files": {str: {"sha256": str}}, "split?": {"by": str}}


def _existing(path: Path, by: str) -> dict[str, Any]:
    hint = "pass --fresh to write it again, or use another --out"
    try:
        manifest = read_json(path, form=_MANIFEST)
    except ValueError as error:
        raise ValueError(f"{path}: not the manifest of a corpus ({error}); {hint}") from None
    python, was = manifest["python"], manifest.get("split", {"by": "file"})["by"]
    files = {name: entry for name, entry in manifest["files"].items() if Path(name).name == name and "\0" not in name}
    changed = [name for name, entry in files.items() if not _is(path.with_name(name), entry["sha256"])]
    if python != platform.python_version():
        raise ValueError(f"{path}: the corpus of Python {python}, this is {platform.python_version()}; {hint}")
    if was != by:
        raise ValueError(f"{path}: a corpus split by {short(was)}, not by {by}; {hint}")
    if changed:
        raise ValueError(f"{path.with_name(changed[0])}: missing or changed since it was written; {hint}")
    return dict(manifest)


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _pairs_of_file(path: Path, name: str, left_out: Counter[str]) -> Iterator[Pair]:
    try:
        with tokenize.open(path) as file:  # honours the coding line
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, MemoryError):
        left_out["unreadable file"] += 1  # templates and deliberately broken sources
        return
    lines = source.split("\n")  # not splitlines: the parser counts no form feeds
    for function, scope, owner in _functions(tree, (), None):
        pair = _pair(function, name, scope, owner, lines)
        if isinstance(pair, str):
            left_out[pair] += 1
        else:
            yield pair


def _functions(
    node: ast.AST, scope: tuple[str, ...], owner: str | None
) -> Iterator[tuple[_Function, tuple[str, ...], str | None]]:
    """All functions below ``node`` with their qualified name and the class that owns them (None: a plain function)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child, (*scope, child.name), owner
            yield from _functions(child, (*scope, child.name), None)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, (*scope, child.name), child.name)
        else:
            yield from _functions(child, scope, owner)


def _pair(function: _Function, file: str, scope: tuple[str, ...], owner: str | None, lines: list[str]) -> Pair | str:
    """The pair of a function, or why it has none."""
    if ast.get_docstring(function, clean=False) is None:
        return "no docstring"
    docstring, rest = function.body[0], function.body[1:]
    if not rest:
        return "no body"
    last = docstring.end_lineno or docstring.lineno
    if function.lineno == docstring.lineno or rest[0].lineno <= last:
        return "on one line"
    head = textwrap.dedent("\n".join(lines[function.lineno - 1 : last])).rstrip()
    body = textwrap.dedent("\n".join(lines[last : function.end_lineno])).strip("\n")
    if not _same_code(body, rest):
        return "not dedentable"
    kind = f"method of the class {owner}" if owner else "function"
    return Pair(
        id=f"{file}:{function.lineno}:{'.'.join(scope)}",
        file=file,
        instruction=f"Write the body of this Python {kind}.\n\n{head}",
        body=body,
    )


def _same_code(body: str, statements: list[ast.stmt]) -> bool:
    """Whether the dedented text is still the same program (a string over several lines may pin the indentation)."""
    try:
        parsed = ast.parse(body).body
    except (SyntaxError, ValueError):
        return False
    return [ast.dump(s) for s in parsed] == [ast.dump(s) for s in statements]
