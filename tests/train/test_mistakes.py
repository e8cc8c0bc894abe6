"""A user's mistakes: one line (what, where, the fix), status 2, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_tide import cli, distill
from megatron_tide.train.distributed import init_distributed


def refusal(capsys, *argv):
    """The one line that the entry prints; everything up to building models runs in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.run(distill.main, list(argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "tide-crss"}, "invalid choice: 'tide-crss'"),
        ({"lr": "fast"}, "invalid float value: 'fast'"),
        ({"temperature": 0.0}, "--temperature 0.0: must be between 0.001 and 1000"),
        ({"compdemo_ratio": 1.5}, "--compdemo-ratio 1.5: must be between 0 and 1"),
        ({"global_batch_size": 7}, "--global-batch-size 7 is not a multiple of --micro-batch-size 4 x 1 ranks = 4"),
        ({"global_batch_size": 4096, "micro_batch_size": 4}, "more than the 48 prepared samples"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json: no such file"),
        ({"epochs": 1e9, "max_steps": 0}, "steps; the most are 99999999"),
        ({"data": "nowhere"}, "nowhere: no such folder of prepared data"),
        ({"bridge": "nowhere"}, "nowhere: no bridge here"),
        ({"student": "/nowhere"}, "/nowhere"),
        ({"teacher": "/nowhere"}, "/nowhere"),
        ({"eval_every": 5}, "--eval-every needs --validation"),
        ({"config": "nowhere.json"}, "--config nowhere.json: no such file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_setting(chain, out, capsys, settings, said):
    line = refusal(capsys, *chain.flags(out, **settings), "--dry-run")
    assert said in line
    assert "error: " in line
    assert not out.exists()


def test_missing_folders_are_named_together(capsys):
    assert "missing --student, --data, --out, --teacher, --bridge" in refusal(capsys, "--dry-run")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "contains a JSON list, not an object"),
        ('{"zero_optimization": {"stage": 3}}', "stage is 3; use 1 or 2 for the student"),
        ('{"zero_optimization": {"stage": 1}, "train_batch_size": 4}', "remove 'train_batch_size'"),
        ('{"zero_optimization": {"stage": 1}, "sparse_gradients": true}', "remove 'sparse_gradients'; it may change"),
        (
            '{"zero_optimization": {"stage": 1}, "gradient_allreduce_op": "sum"}',
            "remove 'gradient_allreduce_op'; it may",
        ),
        ('{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}', "remove 'zenflow'; it may change"),
    ],
)
def test_deepspeed_json(chain, out, capsys, tmp_path, content, said):
    (tmp_path / "ds.json").write_text(content)
    assert said in refusal(capsys, *chain.flags(out, deepspeed=tmp_path / "ds.json"), "--dry-run")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"learning_rate": 1}', "unknown flag 'learning_rate'"),
        ('{"max_grad_norm": "high"}', "max_grad_norm = 'high' must be float"),
        ('{"save": {"keep_last": 2.5}}', "keep_last = 2.5 must be int"),
        ('{"config": "other.json"}', "unknown flag 'config'"),
        ("nonsense", "not valid JSON"),
    ],
)
def test_config_file(chain, out, capsys, tmp_path, content, said):
    (tmp_path / "run.json").write_text(content)
    assert said in refusal(capsys, *chain.flags(out), "--config", str(tmp_path / "run.json"), "--dry-run")


def test_data_of_another_bridge(chain, out, capsys, tmp_path):
    """A bridge whose recorded student is another tokenizer is refused, and so are data that another bridge aligned."""
    swapped = refusal(capsys, *chain.flags(out, student=chain.root / "teacher"), "--dry-run")
    assert "not the student tokenizer that the bridge was built for" in swapped
    student_only = refusal(capsys, *chain.flags(out, data=chain.root / "student_only"), "--dry-run")
    assert "prepared with teacher tokenizer none" in student_only


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_data_of_another_chat_template(chain, out, capsys, tmp_path, side):
    """Prompts rendered by template A do not train a model that will be prompted with template B."""
    shutil.copytree(chain.root / side, tmp_path / side)
    (tmp_path / side / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    line = refusal(capsys, *chain.flags(out, **{side: tmp_path / side}), "--dry-run")
    assert f"prompts rendered with {side} chat template" in line
    assert "prepare again" in line


def test_tampered_bridge(chain, out, capsys, tmp_path):
    shutil.copytree(chain.root / "bridge", tmp_path / "bridge")
    manifest = tmp_path / "bridge" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"shared": false', '"shared": true'))
    assert "checksums do not match" in refusal(capsys, *chain.flags(out, bridge=tmp_path / "bridge"), "--dry-run")


def test_truncated_shard(chain, out, capsys, tmp_path):
    shutil.copytree(chain.root / "data", tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    line = refusal(capsys, *chain.flags(out, data=tmp_path / "data"), "--dry-run")
    assert str(shard) in line


def test_a_strategy_that_needs_a_teacher_in_parts(chain, out, capsys):
    flags = ["--student", str(chain.root / "student"), "--data", str(chain.root / "student_only"), "--out", str(out)]
    line = refusal(capsys, *flags, "--strategy", "bd3lm", "--chunk-objective", "calm", *BATCH, "--dry-run")
    assert "needs a teacher: give --teacher and --bridge" in line


BATCH = ["--global-batch-size", "8", "--micro-batch-size", "4"]


def test_a_config_of_no_model_or_of_one_with_fewer_tokens(chain, out, capsys, tmp_path):
    folder = shutil.copytree(chain.root / "teacher", tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"model_type": "../x"}, "config.json: model_type '../x' is not one of"),
        ({"hidden_size": 10**9}, "config.json: hidden_size is 1000000000, not a whole number"),
        ({"vocab_size": 300}, "config.json has vocab_size 300, the tokenizer of"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert said in refusal(capsys, *chain.flags(out, teacher=folder), "--dry-run")


def test_dry_run_checks_and_prints_without_writing(chain, out, capsys):
    assert distill.main([*chain.flags(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "48 samples, 4 steps of 8 samples: OK" in printed
    assert json.loads(printed[: printed.rindex("}") + 1])["strategy"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tidal_peak": 0.5, "muon_lr": 0.1}, "--tidal-peak, --muon-lr"),
        ({"tidal": "mix", "tidal_peak": 0.5, "optimizer": "muon", "muon_lr": 0.1}, ""),
        ({"strategy": "bd3lm", "temperature": 1.0, "compdemo_ratio": 0.4}, "--temperature, --compdemo-ratio"),
        ({"strategy": "bd3lm", "preset": "ours", "validation": "DATA"}, "--validation"),
        ({"strategy": "bd3lm", "preset": "ours", "epochs": 2.0, "max_steps": 3}, "--epochs"),
        ({"strategy": "bd3lm", "preset": "ours", "max_steps": 3}, ""),
    ],
)
def test_flags_that_change_nothing_are_told(chain, out, capsys, settings, said):
    settings = {name: chain.root / "data" if value == "DATA" else value for name, value in settings.items()}
    assert distill.main([*chain.flags(out, **settings), "--dry-run"]) == 0
    assert capsys.readouterr().err == (f"note: {said}: nothing in this run uses that\n" if said else "")


def test_a_world_that_no_launcher_made_is_not_waited_for(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 in the environment without RANK"):
        init_distributed()
