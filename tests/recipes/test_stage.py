"""A stage runs once, again when its command or what comes before it changed, and never counts when it failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tide.report.run_folder import read_stages
from recipes import stage as recipe_stage
from recipes.quickstart import report

STAGE = Path(__file__).resolve().parents[2] / "recipes" / "stage.py"


def stage(stamp, *command, after=None):
    extra = ["--after", str(after)] if after else []
    line = [sys.executable, str(STAGE), str(stamp), *extra, "--", *command]
    return subprocess.run(line, capture_output=True, text=True, timeout=240)


def append(path, word):
    return (sys.executable, "-c", f"open({str(path)!r}, 'a').write({word!r})")


def test_runs_once_and_records_what_it_took(tmp_path):
    stamp, log = tmp_path / "s" / "one.json", tmp_path / "log"
    first, second = stage(stamp, *append(log, "a")), stage(stamp, *append(log, "a"))
    assert (first.returncode, second.returncode) == (0, 0)
    assert log.read_text() == "a"
    assert "already done, skipped" in second.stdout
    record = json.loads(stamp.read_text())
    assert record["seconds"] > 0
    assert record["peak_process_bytes"] > 1e6


def test_an_edited_setting_runs_it_again(tmp_path):
    stamp, log = tmp_path / "one.json", tmp_path / "log"
    stage(stamp, *append(log, "a"))
    stage(stamp, *append(log, "b"))
    assert log.read_text() == "ab"


def test_a_stage_before_it_that_ran_again_runs_it_again(tmp_path):
    one, two, log = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "log"
    stage(one, *append(log, "1"))
    stage(two, *append(log, "2"), after=one)
    stage(two, *append(log, "2"), after=one)
    assert log.read_text() == "12"
    stage(one, *append(log, "x"))
    stage(two, *append(log, "2"), after=one)
    assert log.read_text() == "12x2"


def copy(source, out):
    return (sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])", str(source), str(out))


def test_an_edited_input_runs_it_again(tmp_path):
    """Also one of the same size and time; what the command wrote itself is no input."""
    stamp, data, out = tmp_path / "one.json", tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("a")
    assert "skipped" not in stage(stamp, *copy(data, out)).stdout
    assert "skipped" in stage(stamp, *copy(data, out)).stdout
    before = data.stat()
    data.write_text("b")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = stage(stamp, *copy(data, out))
    assert f"== one ({data} changed)" in again.stdout
    assert out.read_text() == "b"
    assert "skipped" in stage(stamp, *copy(data, out)).stdout
    out.write_text("made by hand")
    assert stage(stamp, *copy(data, out)).stdout == "== one: already done, skipped\n"
    out.unlink()
    skipped = stage(stamp, *copy(data, out)).stdout
    assert skipped == f"== one: already done, skipped ({out} is gone since; to make it again, remove {stamp})\n"
    assert not out.exists()
    stamp.unlink()
    stage(stamp, *copy(data, out))
    assert out.exists()


def test_an_edited_file_of_a_folder_or_of_a_mixture_runs_it_again(tmp_path):
    (tmp_path / "folder").mkdir()
    for edited in ("folder/weights", "rows.jsonl"):
        (tmp_path / edited).write_text("a")
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": "rows.jsonl"}, {"path": "hub/name"}]}))
    command = (sys.executable, "-c", "pass", f"name={tmp_path / 'folder'}", str(mixture))
    for edited in ("folder/weights", "rows.jsonl"):
        stage(tmp_path / "one.json", *command)
        assert "skipped" in stage(tmp_path / "one.json", *command).stdout
        (tmp_path / edited).write_text("b")
        (tmp_path / "folder" / "README.md").write_text("a card of scores is no input")
        assert "changed)" in stage(tmp_path / "one.json", *command).stdout
    chosen = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: {}\nsize: 1\n---\n{}"
    for edited, runs in ((("a.csv", ""), True), (("a.csv", "scores"), False), (("b.csv", "scores"), True)):
        (tmp_path / "folder" / "README.md").write_text(chosen.format(*edited))
        assert ("changed)" in stage(tmp_path / "one.json", *command).stdout) == runs


def test_a_failed_stage_says_so_and_is_not_done(tmp_path):
    stamp = tmp_path / "one.json"
    failed = stage(stamp, sys.executable, "-c", "raise SystemExit(2)")
    assert failed.returncode == 2
    assert "stage one stopped with status 2" in failed.stderr
    assert not stamp.exists()


def test_two_jobs_on_one_folder(tmp_path):
    first, second = tmp_path / "s" / "first.json", tmp_path / "s" / "second.json"
    line = [sys.executable, str(STAGE), str(first), "--", sys.executable, "-c", "input()"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "s" / ".lock").exists():
            assert process.poll() is None
        refused = stage(second, *append(tmp_path / "log", "a"))
        process.communicate("\n", timeout=240)
    assert refused.returncode == 2
    assert f"(process {process.pid} on " in refused.stderr
    assert not (tmp_path / "log").exists()
    assert first.exists()
    assert stage(second, *append(tmp_path / "log", "a")).returncode == 0


def test_its_place_and_the_time_left_by_this_machines_pace(tmp_path):
    expected = "--expected=one=10 two=100 three=490"
    line = [sys.executable, str(STAGE)]
    plan = ["--plan", "one two three", expected]

    def started(name, *flags):
        command = [*line, str(tmp_path / f"{name}.json"), *flags, "--", sys.executable, "-c", "pass"]
        return subprocess.run(command, capture_output=True, text=True, timeout=240).stdout.splitlines()

    assert started("one", *plan)[1] == "== one  [1/3]  about 10 min left"
    stamp = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps(stamp | {"seconds": 50.0}))  # (50 + 30) / (10 + 30): twice as long
    assert started("one", *plan) == ["== one: already done, skipped"]
    assert started("two", *plan)[1] == "== two  [2/3]  about 20 min left"
    (tmp_path / "two.json").unlink()
    assert started("two", "--plan", "one two three", "--expected=two=5")[1] == "== two  [2/3]"
    assert started("three", "--plan", "one two three", "--expected=three=8")[1].startswith("== three  [3/3]  about ")
    assert started("four", "--plan", "one two three")[1] == "== four"


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (recipe_stage.main, ["s.json", "--expected", "one=soon"], "--expected: 'soon' is not a number from 0 to"),
        (recipe_stage.main, ["s.json", "--expected", "one=nan"], "--expected: 'nan' is not a number from 0 to"),
        (report.main, ["runs", "--seed", "1e3"], "--seed: '1e3' is not a whole number from 0 to"),
        (report.main, ["runs", "--seed", "-1"], "--seed: '-1' is not a whole number from 0 to"),
        (report.main, ["runs", "--seed", "9" * 5000], "--seed: '99999"),
        (report.main, ["runs"], "the following arguments are required: --seed"),
    ],
)
def test_numbers_of_recipes_are_checked_in_one_line(command, flags, said):
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the text is checked below
        command(flags)
    assert str(refused.value).startswith(said)
    assert len(str(refused.value)) < 400


def test_stages_of_earlier_settings_are_not_reported_as_the_last_runs(tmp_path):
    """Neither one that the recipe has no more, nor one that waits for an earlier one that ran again."""

    def ran(names, plan):
        for name in names:
            assert recipe_stage.main([str(tmp_path / f".stages/{name}.json"), "--plan", plan, "--", "true"]) == 0
        stages, corrupt = read_stages(tmp_path)
        assert not corrupt
        return list(stages["name"])

    assert ran(["data", "train-kl", "convert"], "data train-kl convert") == ["data", "train-kl", "convert"]
    assert ran(["data", "convert"], "data convert") == ["data", "convert"]  # both are skipped
    assert ran(["convert"], "(data) (train-kl) convert") == ["data", "train-kl", "convert"]  # ONLY="convert"
    (tmp_path / ".stages/data.json").unlink()
    assert ran(["data"], "data convert") == ["data"]
    (tmp_path / ".stages/stages").write_text("{")
    stages, corrupt = read_stages(tmp_path)
    assert len(stages) == 3
    assert len(corrupt) == 1


def test_a_loop_of_links_in_a_stamps_place_is_no_error(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "one.json").symlink_to("one.json")
    done = stage(tmp_path / "one.json", *append(log, "a"), str(log))
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or "one.json" in done.stderr
