"""The plan command: a table for a machine, the flags to set, one clear line where nothing fits."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

from megatron_tide import cli
from megatron_tide.commands import plan

EIGHT = ["--gpus", "8", "--gpu-mem", "24", "--host-mem", "256", "--nvme", "500"]


def printed_by(capsys, *argv):
    status = cli.call(plan, argv, "plan")
    return status, capsys.readouterr().out


def test_table_of_eight_small_gpus(capsys):
    status, printed = printed_by(capsys, *EIGHT)
    assert status == 0
    assert "8 GPU(s) of 24 GiB, 256 GiB of host memory, 500 GB free on disk" in printed
    assert "teacher  16.256 B, bf16" in printed
    assert "64 samples: 8 rank(s) x 2 micro-batches of 4" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.endswith("fits") or "  no: " in line}
    assert rows["zero3"].endswith("fits")
    assert re.search(r"no: each GPU needs \d+\.\d GiB more", rows["replicated"])
    assert "set: --teacher-hosting pipeline_" in printed
    assert "teacher weights" in printed


def test_disk_hosting_asks_for_a_folder(capsys):
    status, printed = printed_by(capsys, "--gpus", "1", "--gpu-mem", "24", "--host-mem", "32", "--nvme", "500")
    assert status == 0
    assert "set: --teacher-hosting zero3_nvme --teacher-nvme FOLDER" in printed
    assert "HOSTING=zero3_nvme TEACHER_NVME=FOLDER" in printed


def test_savings_that_make_it_fit(capsys):
    status, printed = printed_by(capsys, "--gpus", "1", "--gpu-mem", "21", "--host-mem", "64")
    assert status == plan.EXIT_NOTHING_FITS
    assert "nothing fits with these flags; closest is zero3_cpu: each GPU: needs" in printed
    assert "set: --activation-checkpointing --teacher-hosting zero3" in printed
    again, printed = printed_by(
        capsys, "--gpus", "1", "--gpu-mem", "21", "--host-mem", "64", "--activation-checkpointing"
    )
    assert again == 0
    assert "recomputed layers" in printed


def test_nothing_helps(capsys):
    status, printed = printed_by(capsys, "--gpus", "1", "--gpu-mem", "4", "--host-mem", "8")
    assert status == plan.EXIT_NOTHING_FITS
    savings = "--activation-checkpointing --micro-batch-size 1 --deepspeed ds_configs/zero2_offload.json"
    assert f"nothing fits with {savings}: " in printed
    assert "too little" in printed


def test_training_settings_count(capsys):
    _, plain = printed_by(capsys, *EIGHT)
    _, doubled = printed_by(capsys, *EIGHT, "--compdemo", "--teacher-length", "2048")
    assert "2048 positions per sample, twice (CompDemo)" in doubled
    assert plain != doubled
    status, alone = printed_by(capsys, *EIGHT, "--strategy", "bd3lm")
    assert status == 0
    assert "\nteacher  " not in alone
    assert "set: nothing, the defaults fit" in alone


def test_json_holds_everything(capsys, tmp_path):
    printed_by(capsys, *EIGHT, "--json", str(tmp_path / "plan.json"))
    written = json.loads((tmp_path / "plan.json").read_text())
    assert {item["hosting"] for item in written["plans"]} >= {"replicated", "zero3", "zero3_nvme", "pipeline_8"}
    for item in written["plans"]:
        assert item["machine"]["ranks"] == 8
        has = plan.USABLE * 24 * 2**30  # the driver keeps the rest
        assert (sum(item["gpu"]["parts"].values()) > has) == ("each GPU" in item["lacks"])
        assert item["fits"] == (not item["lacks"])
        assert item["seconds"] > 0


def test_this_machine_is_the_default(capsys):
    printed_by(capsys)
    status, printed = printed_by(capsys, "--strategy", "bd3lm", "--gpus", "0")
    assert status in (0, plan.EXIT_NOTHING_FITS)
    assert "machine  no GPU, 1 rank(s), " in printed


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--gpus", "9", "--gpu-mem", "24"],
            "--global-batch-size 64 is not a multiple of --micro-batch-size 4 x 9 ranks",
        ),
        (["--teacher", "/nowhere"], "/nowhere: no such folder"),
        (["--deepspeed", "nowhere.json"], "--deepspeed nowhere.json: no such file"),
        (["--gpus", "8", "--gpu-mem", "24", "--gpu-tflops", "0"], "--gpu-tflops 0.0: must be at least 1e-06"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        cli.run(partial(cli.call, plan, prog="plan"), argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.call(plan, ["--help"], "plan")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert {"--gpus", "--gpu-mem", "--host-mem", "--nvme", "--nodes", "--json", "--disk-gbs"} <= set(shown.split())
