"""Every file that the project reads, corrupt: the answer is a result, or one line that names the file or its folder.

No reader hangs, takes memory that a file only claims, or raises another exception. The seed is fixed, and so is the
number of changes of each file; TIDE_FUZZ=N tries N, TIDE_FUZZ_SEED others.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_tide.screen import words_of
from tests.support import readers, run_readers
from tests.support.damage import damage, restore
from tests.support.readable import World, make_world

ROUNDS, SEED = (int(os.environ.get(*name)) for name in (("TIDE_FUZZ", "25"), ("TIDE_FUZZ_SEED", "20261126")))
CASES = readers.CASES | run_readers.CASES
MORE_PLACES = {"run.json as --config": ["--"], "mixture": ["corpus.jsonl", "kinds.jsonl"]}  # what their values name
SECONDS, MEMORY = 30, 2 << 30  # of one read: far above what a valid file takes


class Hangs(BaseException):
    """A read took longer than SECONDS."""


@contextmanager
def bounded() -> Iterator[None]:
    """At most SECONDS, and MEMORY more than now."""

    def late(*_: object) -> None:
        raise Hangs

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, old = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def problem(case: str, world: World) -> str:
    """What is wrong with the answer to a corrupt file; "" where nothing is."""
    file, read = CASES[case]
    try:
        with bounded():
            read(world)
    except (ValueError, OSError) as error:
        said = " ".join(words_of(error).split())
        places = (Path(file).name, str(world.root), file, *MORE_PLACES.get(case, ()))
        named = any(name in said for name in places)
        return "" if named and len(said) < 2000 else f"{type(error).__name__} without its place: {said[:300]}"
    except BaseException as error:
        at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__}: {str(error)[:300]} ({' '.join(at[-4:])})"
    return ""


@pytest.fixture(scope="module")
def valid(chain, tmp_path_factory) -> World:
    return make_world(chain, tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def world(valid: World, tmp_path: Path) -> World:
    """A copy for each case: what a read writes beside its file is not there for the next."""
    shutil.copytree(valid.out, tmp_path / "out", symlinks=True)
    return World(Path(shutil.copytree(valid.root, tmp_path / "root", symlinks=True)), tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_a_corrupt_file_is_a_result_or_one_line(
    valid: World, world: World, case: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    path, top = world.root / CASES[case][0], Path(CASES[case][0]).parts[0]
    rng, problems = random.Random(f"{SEED} {case}"), []
    CASES[case][1](world)  # the valid file is read
    for number in range(ROUNDS):
        restore(world.root / top, valid.root / top)
        damage(path, rng)
        if path.is_file():
            shutil.copyfile(path, tmp_path / f"corrupt-{number}")
        if found := problem(case, world):
            problems.append(f"{number}: {found}")
    assert not problems, "\n".join(problems)
