"""Mistakes in where a teacher should be: one line (what, where, the fix), told before ranks start if it can be."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tide import cli, distill
from megatron_tide.hosting.place import open_layer_specs
from tests.hosting.backends import host_of, joined, windows_of
from tests.support.models import tiny_student_config, tiny_teacher_config, write_hub_folder
from tests.support.ranks import run_on_ranks


def refusal(chain, out, capsys, **knobs):
    """The one line of a dry run."""
    with pytest.raises(SystemExit) as stop:
        cli.run(distill.main, [*chain.flags(out, **knobs), "--dry-run"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert not out.exists()
    return printed.strip().splitlines()[-1]


CPU = {"stage": 3, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("hosting", "content", "said"),
    [
        ("zero3", {"zero_optimization": {"stage": 2}}, "stage is 2; --teacher-hosting zero3 takes 3"),
        ("zero3", {}, "stage is None; --teacher-hosting zero3 takes 3"),
        ("zero3", {"zero_optimization": 3}, "zero_optimization is 3; it is an object"),
        ("zero3", {"zero_optimization": {**CPU, "offload_param": "cpu"}}, "offload_param is 'cpu'; it is an object"),
        (
            "zero3",
            {"zero_optimization": {**CPU, "offload_param": {"device": "disk"}}},
            "offload_param.device is 'disk'; it is one of none, cpu, nvme",
        ),
        (
            "zero3",
            {"zero_optimization": {**CPU, "offload_param": {"device": "nvme"}}},
            "None is no folder to write to; give --teacher-nvme",
        ),
        ("zero3", {"zero_optimization": CPU, "optimizer": {}}, "remove 'optimizer'"),
        ("pipeline", {"zero_optimization": CPU}, "pipeline.stages is None; it is the number of ranks"),
        ("pipeline", {"pipeline": {"stages": 0}}, "pipeline.stages is 0; it is the number of ranks"),
        ("pipeline", {"pipeline": {"stages": "2"}}, "pipeline.stages is '2'; it is the number of ranks"),
        ("pipeline", {"pipeline": 2}, "pipeline is 2; it is an object"),
        ("pipeline", {"pipeline": {"stages": 1}, "zero_optimization": CPU}, "takes no ZeRO stage 2 or 3"),
        ("replicated", {"zero_optimization": CPU}, "a replicated teacher has none; give --teacher-hosting as well"),
    ],
)
def test_deepspeed_json_of_the_teacher(chain, capsys, tmp_path, hosting, content, said):
    file = tmp_path / "teacher.json"
    file.write_text(json.dumps(content))
    line = refusal(chain, tmp_path / "run", capsys, teacher_hosting=hosting, teacher_deepspeed=file)
    assert f"--teacher-deepspeed {file}" in line
    assert said in line


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"teacher_hosting": "everywhere"}, "invalid choice: 'everywhere'"),
        ({"teacher_hosting": "zero3", "teacher_deepspeed": "nowhere.json"}, "nowhere.json: no such file"),
        ({"teacher_hosting": "zero3", "teacher_nvme": "."}, "teacher_zero3.json does not put the teacher on disk"),
        ({"teacher_hosting": "pipeline", "teacher_nvme": "."}, "--teacher-hosting pipeline puts nothing on disk"),
        ({"teacher_nvme": "."}, "--teacher-nvme .: --teacher-hosting replicated puts nothing on disk"),
        (
            {
                "teacher_hosting": "zero3",
                "teacher_deepspeed": "ds_configs/teacher_zero3_nvme.json",
                "teacher_nvme": "/nowhere",
            },
            "/nowhere is no folder to write to; give --teacher-nvme",
        ),
    ],
)
def test_flags(chain, capsys, tmp_path, knobs, said):
    assert said in refusal(chain, tmp_path / "run", capsys, **knobs)


def test_stages_that_do_not_divide_the_ranks(chain, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(chain, tmp_path / "run", capsys, teacher_hosting="pipeline", global_batch_size=12)
    assert "teacher_pipeline_2.json: 2 stages cannot be shared out over 3 rank(s); start a multiple of 2 ranks" in line


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
            f"{EXPERT} has shape [32, 16], config.json makes it [16, 32]",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(321, 32)}),
            "lm_head.weight has shape [321, 32], config.json makes it [320, 32]",
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


def of_ranks(knobs):
    """The line a rank stops with."""
    with joined() as world:
        strategy, _ = windows_of(knobs, world)
        try:
            host_of(knobs, strategy, world)
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
    knobs = chain.run(tmp_path / "run", teacher=str(teacher), teacher_hosting="zero3")
    first, second = run_on_ranks(of_ranks, 2, knobs)
    assert first == second
    assert "lm_head.weight has shape" in first
