"""Results on disk: what is found again, and what never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.evaluate.store import Item, Store, resumed

SETTINGS = {"model": "a", "max_new_tokens": 16}


def items(count: int, word: str = "input") -> list[Item]:
    return [Item(f"task/{number}", f"{word}-{number}", number) for number in range(count)]


class Squares:
    """Computes; remembers the windows it was asked for, and breaks off in one of them."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.windows: list[tuple[int, list[int]]] = []
        self._breaks_at = breaks_at

    def __call__(self, contents: list[int], first: int) -> list[Any]:
        if first == self._breaks_at:
            raise KeyboardInterrupt
        self.windows.append((first, contents))
        return [{"square": number * number, "first": first} for number in contents]


def run(store: Store, work: list[Item], squares: Squares) -> list[Any]:
    return resumed(store, work, squares, 4, lambda done: None)


def test_a_stopped_evaluation_goes_on_with_the_same_windows(tmp_path: Path) -> None:
    whole = run(Store(tmp_path / "whole", "t", SETTINGS), items(10), Squares())
    with pytest.raises(KeyboardInterrupt):
        run(Store(tmp_path / "cut", "t", SETTINGS), items(10), Squares(breaks_at=8))
    second = Squares()
    assert run(Store(tmp_path / "cut", "t", SETTINGS), items(10), second) == whole
    assert second.windows == [(8, [8, 9])]
    (first,), (again,) = (list((tmp_path / name).iterdir()) for name in ("whole", "cut"))
    assert first.name == again.name
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("torn", [b'{"key": "task/6", "inp', b'{"key": "task/6"}', b"\xff\xfe", b"[1]\n"])
def test_a_half_written_line_is_dropped_and_its_window_done_again(tmp_path: Path, torn: bytes) -> None:
    run(Store(tmp_path, "t", SETTINGS), items(8), Squares())
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + torn)
    squares = Squares()
    values = run(Store(tmp_path, "t", SETTINGS), items(8), squares)
    assert [value["square"] for value in values] == [number * number for number in range(8)]
    assert squares.windows == [(4, [4, 5, 6, 7])]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_other_settings_and_other_prompts_do_not_mix(tmp_path: Path) -> None:
    run(Store(tmp_path, "t", SETTINGS), items(4), Squares())
    for store, work in (
        (Store(tmp_path, "t", {**SETTINGS, "model": "b"}), items(4)),
        (Store(tmp_path, "u", SETTINGS), items(4)),
        (Store(tmp_path, "t", SETTINGS), items(4, "another prompt")),
    ):
        squares = Squares()
        run(store, work, squares)
        assert squares.windows == [(0, [0, 1, 2, 3])]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_first_line_says_what_a_file_holds(tmp_path: Path) -> None:
    store = Store(tmp_path, "t", SETTINGS)
    assert json.loads(store.path.read_text()) == {"settings": SETTINGS}


def test_progress_counts_what_was_there(tmp_path: Path) -> None:
    run(Store(tmp_path, "t", SETTINGS), items(4), Squares())
    seen: list[int] = []
    resumed(Store(tmp_path, "t", SETTINGS), items(6), Squares(), 4, seen.append)
    assert seen == [4, 6]
