"""README's table "you have -> set this": each row's options run through the recipe, and its plan fits its machine.

A row's second cell holds its machine as the plan command takes it, and its third code spans of options (NAME=VALUE) and
flags, as one would type them before and after the recipe.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tide import cli, distill
from megatron_tide.choices import TEACHER_HOSTINGS
from megatron_tide.commands import cache, plan

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = REPOSITORY / "megatron_tide" / "models" / "configs"
RECIPE = "recipes/distill_16b_to_0.6b.sh"
HEADER = "| you have |"


def rows_of(text):
    """[(machine's flags, options, training flags), ...] of the table."""
    lines = iter(text.splitlines())
    found = []
    for line in lines:
        if not line.startswith(HEADER):
            continue
        next(lines)  # |---|
        for row in lines:
            if not row.startswith("|"):
                break
            _, machine, settings, *_ = [cell.strip() for cell in row.strip("|").split(" | ")]
            words = [word for span in re.findall(r"`([^`]+)`", settings) for word in shlex.split(span)]
            options = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
            flags = [word for word in words if not re.match(r"[A-Z_]+=", word)]
            found.append((shlex.split(machine.strip("`")), options, flags))
    return found


ROWS = rows_of((REPOSITORY / "README.md").read_text(encoding="utf-8"))


def stage_of(lines, title):
    """The words of the first stage with a title that begins so."""
    return shlex.split(lines[next(n for n, line in enumerate(lines) if line.startswith(title)) + 1])


def test_every_hosting_has_a_row():
    kinds = {"cached" if "CACHE" in options else options["HOSTING"] for _, options, _ in ROWS}
    assert kinds == set(TEACHER_HOSTINGS)


@pytest.mark.parametrize(("machine", "options", "flags"), ROWS, ids=lambda value: " ".join(value))
def test_row_loads_dry_runs_and_fits(machine, options, flags, tmp_path, capsys):
    gpus = machine[machine.index("--gpus") + 1]
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DRY_RUN": "1",
        "NPROC": str(max(1, int(gpus))),
        "STUDENT": str(SHAPES / "qwen3_0.6b.json"),
        "TEACHER": str(SHAPES / "llada2_mini.json"),
        **options,
    }
    finished = subprocess.run(
        ["bash", str(REPOSITORY / RECIPE), *flags], capture_output=True, text=True, timeout=240, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    training = stage_of(lines, "# train-")
    given = training[training.index("megatron_tide.distill") + 1 :]
    hosting = cli.parse(distill, given).run.teacher.teacher_hosting
    if "CACHE" in options:
        assert hosting == "cached"
        asking = stage_of(lines, "# cache")
        given = asking[asking.index("cache") + 1 :]
        hosting = cli.parse(cache, given).run.teacher.teacher_hosting
    assert hosting == options["HOSTING"]
    assert cli.call(plan, [*machine, *given, "--json", str(tmp_path / "plan.json")], "plan") == 0
    planned = json.loads((tmp_path / "plan.json").read_text())["plans"]
    mine = next(item for item in planned if item["hosting"] == options["HOSTING"])
    assert mine["fits"], mine["lacks"]
