"""DRY_RUN: only a clear "no" starts work, or removes a folder."""

from __future__ import annotations

import os
import subprocess

import pytest

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
