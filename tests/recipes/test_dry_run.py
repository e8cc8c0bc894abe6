"""DRY_RUN: only a clear "no" starts work, or removes a folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_tide.lock import RunLock
from tests.recipes.test_recipes import run
from tests.support.launch import REPOSITORY


@pytest.mark.parametrize("word", ["0", "false", "no", ""])
def test_what_means_no_dry_run(word):
    shown = subprocess.run(
        ["bash", "-c", 'source recipes/common.sh; printf %s "$DRY_RUN"'],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "DRY_RUN": word},
    )
    assert (shown.stdout, shown.stderr) == ("0", "")


@pytest.mark.parametrize("word", ["yes", "TRUE", "2", "garbage; rm x", "FALSE", " 0"])
def test_every_other_word_is_a_dry_run_which_removes_nothing(word, tmp_path):
    kept = tmp_path / "quickstart" / "hours of work"
    kept.mkdir(parents=True)
    shown = [run("quickstart.sh", "--fresh", DRY_RUN=one, RUNS=str(tmp_path)) for one in (word, "1")]
    assert shown[0].returncode == 0, shown[0].stderr
    assert shown[0].stdout == shown[1].stdout
    assert list(tmp_path.rglob("*")) == [kept.parent, kept]


@pytest.mark.parametrize("name", ["/", ".", "..", "../recipes", "a/b", "/tmp", "-x", "a\nb", "\x1b]0;x\x07"])
def test_only_a_folder_of_its_own_is_started_over(name: str) -> None:
    refused = run("quickstart.sh", "--fresh", DRY_RUN="1", NAME=name)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: NAME=")
    assert refused.stderr.count("\n") == 1


def test_starting_over_removes_a_recipe_s_folder_that_nobody_uses(tmp_path):
    def remove_run(**more):
        settings = {"NAME": "run", "RUNS": str(tmp_path), "PYTHON": sys.executable, **more}
        line = ["bash", "-c", "source recipes/common.sh; remove_run"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **settings})
        return done.returncode, done.stderr

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    assert remove_run() == (
        2,
        f"error: {folder}: no recipe's folder (it has no .stages), so --fresh does not remove it; set another NAME\n",
    )
    (folder / ".stages").mkdir()
    with RunLock(folder / ".stages"):
        assert remove_run() == (2, f"error: {folder}: in use by another run; stop it first\n")
    assert remove_run(DRY_RUN="1") == (0, "")
    assert folder.exists()
    assert remove_run() == (0, "")
    assert not folder.exists()
    assert remove_run() == (0, "")
