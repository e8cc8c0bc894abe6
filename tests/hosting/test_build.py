"""From flags to a backend: mistakes are one line, before ranks start if possible; a run has its own folder on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tide import cli, distill
from megatron_tide.choices import TEACHER_HOSTINGS
from megatron_tide.config import CACHED, TeacherConfig
from megatron_tide.hosting.build import hosting_of, named_hosting
from megatron_tide.hosting.layerwise import open_layer_specs
from megatron_tide.hosting.zero3 import own_folder
from tests.hosting.backends import joined, loader_of, teacher_of
from tests.support.models import tiny_student_config, tiny_teacher_config, write_hub_folder
from tests.support.ranks import run_on_ranks


def refusal(chain, out, capsys, **flags):
    """The one line of a dry run."""
    with pytest.raises(SystemExit) as stop:
        cli.run(distill.main, [*chain.flags(out, **flags), "--dry-run"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert not out.exists()
    return printed.strip().splitlines()[-1]


CPU = {"stage": 3, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("hosting", "content", "said"),
    [
        (None, {"zero_optimization": {"stage": 2}}, "stage is 2; a sharded teacher needs 3"),
        (None, {}, "stage is None; a sharded teacher needs 3"),
        (None, {"zero_optimization": 3}, "zero_optimization is 3; it must be an object"),
        (None, {"zero_optimization": {**CPU, "offload_param": "cpu"}}, "offload_param is 'cpu'; it must be an object"),
        (
            None,
            {"zero_optimization": {**CPU, "offload_param": {"device": "disk"}}},
            "offload_param.device is 'disk'; use one of none, cpu, nvme",
        ),
        (
            None,
            {"zero_optimization": {**CPU, "offload_param": {"device": "nvme"}}},
            "None is not a writable folder; set --teacher-nvme",
        ),
        ("zero3_cpu", {"zero_optimization": CPU, "optimizer": {}}, "remove 'optimizer'"),
        (
            None,
            {"zero_optimization": {**CPU, "zero_quantized_weights": True}},
            "remove 'zero_quantized_weights'; it may",
        ),
        (None, {"pipeline": {}}, "pipeline.stages is None; it must be the number of ranks"),
        (None, {"pipeline": {"stages": 0}}, "pipeline.stages is 0; it must be the number of ranks"),
        ("pipeline_2", {"pipeline": {"stages": "2"}}, "pipeline.stages is '2'; it must be the number of ranks"),
        (None, {"pipeline": 2}, "pipeline is 2; it must be an object"),
        (None, {"pipeline": {"stages": 1}, "zero_optimization": CPU}, "cannot use ZeRO stage 2 or 3"),
        ("pipeline_2", {"zero_optimization": CPU}, "describes zero3_cpu, not --teacher-hosting pipeline_2; use one"),
        ("pipeline_2", {"pipeline": {"stages": 1}}, "describes pipeline_1, not --teacher-hosting pipeline_2; use one"),
        ("replicated", {"zero_optimization": CPU}, "describes zero3_cpu, not --teacher-hosting replicated; use one"),
    ],
)
def test_deepspeed_json_of_the_teacher(chain, capsys, tmp_path, hosting, content, said):
    file = tmp_path / "teacher.json"
    file.write_text(json.dumps(content))
    named = {"teacher_hosting": hosting} if hosting else {}
    line = refusal(chain, tmp_path / "run", capsys, **named, teacher_deepspeed=file)
    assert f"--teacher-deepspeed {file}" in line
    assert said in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"teacher_hosting": "everywhere"}, "invalid choice: 'everywhere'"),
        ({"teacher_deepspeed": "nowhere.json"}, "nowhere.json: no such file"),
        ({"teacher_hosting": "zero3", "teacher_nvme": "."}, "--teacher-hosting zero3 does not use a disk"),
        ({"teacher_hosting": "pipeline_2", "teacher_nvme": "."}, "--teacher-hosting pipeline_2 does not use a disk"),
        ({"teacher_nvme": "."}, "--teacher-nvme .: --teacher-hosting replicated does not use a disk"),
        (
            {"teacher_hosting": "zero3_nvme", "teacher_nvme": "/nowhere"},
            "/nowhere is not a writable folder; set --teacher-nvme",
        ),
    ],
)
def test_flags(chain, capsys, tmp_path, flags, said):
    assert said in refusal(chain, tmp_path / "run", capsys, **flags)


@pytest.mark.parametrize("name", [name for name in TEACHER_HOSTINGS if name != CACHED])
def test_a_name_stands_for_a_deepspeed_json(tmp_path, name):
    """Given as a file of the user's own, the same JSON is the same hosting; also beside its name."""
    nvme = str(tmp_path) if name == "zero3_nvme" else ""
    hosting = hosting_of(TeacherConfig(teacher_hosting=name, teacher_nvme=nvme), 8)
    assert hosting.name == name
    if name == "replicated":
        assert hosting == hosting_of(TeacherConfig(), 8)
        return
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(named_hosting(name).settings))
    for given in (None, name):
        mine = TeacherConfig(teacher_hosting=given, teacher_deepspeed=str(file), teacher_nvme=nvme)
        assert hosting_of(mine, 8) == hosting


def test_stages_that_do_not_divide_the_ranks(chain, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(chain, tmp_path / "run", capsys, teacher_hosting="pipeline_2", global_batch_size=12)
    assert "pipeline_2: 3 rank(s) cannot be split into pipelines of 2 stages; start a multiple of 2 ranks" in line


def changed(folder, change):
    """A teacher's folder after ``change(tensors)``."""
    write_hub_folder(folder, tiny_teacher_config())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(EXPERT), f"lacks 1 tensor(s) ({EXPERT})"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has unexpected 1 tensor(s) (extra)"),
        (
            lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.contiguous()}),
            f"{EXPERT} has shape [32, 16], config.json gives [16, 32]",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(321, 32)}),
            "lm_head.weight has shape [321, 32], config.json gives [320, 32]",
        ),
    ],
    ids=["missing", "unexpected", "turned", "longer"],
)
def test_checkpoint(tmp_path, change, said):
    folder = changed(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        open_layer_specs(str(folder))
    assert str(refused.value).startswith(f"{folder}: ")
    assert "\n" not in str(refused.value)


def test_a_cut_shard(tmp_path):
    """The others do not wait for the rank that reads: each looks at the headers first."""
    folder = write_hub_folder(tmp_path, tiny_student_config(), shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        open_layer_specs(str(folder))


def of_ranks(flags):
    """The line a rank stops with."""
    with joined() as world:
        strategy, _ = loader_of(flags, world)
        try:
            teacher_of(flags, strategy, world)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.ranks
def test_a_misshapen_tensor_is_told_on_every_rank(chain, tmp_path):
    """Only the first rank reads: had it found that while loading, the others would wait for its broadcast."""
    teacher = tmp_path / "teacher"
    shutil.copytree(chain.root / "teacher", teacher)
    file = next(teacher.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, file)
    flags = chain.run(tmp_path / "run", teacher=str(teacher), teacher_hosting="zero3")
    first, second = run_on_ranks(of_ranks, 2, flags)
    assert first == second
    assert "lm_head.weight has shape" in first


USE = """
import sys, time
from pathlib import Path
from megatron_tide.hosting.zero3 import own_folder
own = own_folder(Path(sys.argv[1]), "live")
(own / "share").write_bytes(b"weights")
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""


def start(disk, seconds):
    """A process that has the folder ``live`` and lives for some time from then on."""
    process = subprocess.Popen([sys.executable, "-c", USE, str(disk), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def age(folder):
    """An hour old."""
    os.utime(folder, (time.time() - 3600,) * 2)


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    process = start(tmp_path, 60)
    live = tmp_path / "megatron_tide-live"
    young = tmp_path / "megatron_tide-young"
    (young / ".lock").parent.mkdir()
    (young / ".lock").touch()
    mine = (tmp_path / "mine", tmp_path / "megatron_tide-main")
    for folder in mine:
        folder.mkdir()
    for folder in (live, *mine):
        age(folder)
    own_folder(tmp_path, "second")
    assert (live / "share").exists(), "its run goes on"
    process.kill()
    process.wait()
    age(live)
    own = own_folder(tmp_path, "third")
    assert not live.exists()
    assert young.exists(), "its run may be about to take its lock"
    assert all(folder.exists() for folder in mine)
    assert own.is_dir()


def test_a_run_leaves_nothing(tmp_path):
    process = start(tmp_path, 0)
    assert process.wait(timeout=240) == 0
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_run_share_its_folder(tmp_path):
    first = own_folder(tmp_path, "same")
    (first / "share").touch()
    age(first)
    assert own_folder(tmp_path, "same") == first
    assert (first / "share").exists()
