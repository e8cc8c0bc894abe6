"""Likelihood of text as it is: the numbers of preparing it first; nothing is left behind; what cannot be shared."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tide.commands import held_out
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.train.inputs import read_run_inputs
from tests.support.ar_models import ar_folder
from tests.support.commands import command
from tests.support.lab import Lab, write_checkpoint

evaluate = command("evaluate")
FLAGS = ["--mc-samples", "2", "--samples", "4"]


@pytest.fixture
def rows(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    return Path(shutil.copy(lab.student.parent / "rows.jsonl", tmp_path / "rows.jsonl"))


def scores(out: Path, *flags: str) -> dict[str, Any]:
    evaluate([*flags, *FLAGS, "--json", str(out)])
    return json.loads(out.read_text())


def test_students_alone(lab: Lab, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the blocks that the model states; of a checkpoint, those of its training."""
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.student_data)
    block = json.loads((lab.student_data / "manifest.json").read_text())["student"]["block"]
    for path, flags in ((lab.student, []), (step, ["--student-block", str(block)])):
        data = tmp_path / f"data-{path.name}"
        command("prepare")(["--data", str(rows), "--student", str(lab.student), "--out", str(data), *flags])
        first = scores(tmp_path / "first.json", str(path), "--data", str(data))
        capsys.readouterr()
        found = scores(tmp_path / "found.json", str(path), "--data", str(rows))
        assert capsys.readouterr().out.startswith("model")
        assert found["data"] == {"folder": str(rows), "fingerprint": first["data"]["fingerprint"]}
        assert [{**one, "seconds": 0} for one in found["models"]] == [{**one, "seconds": 0} for one in first["models"]]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_student_and_a_teacher(lab: Lab, rows: Path, tmp_path: Path) -> None:
    """Their tokenizers are aligned on the way, as bridge and prepare do."""
    pair = ["--student", str(lab.student), "--teacher", str(lab.teacher)]
    command("bridge")([*pair, "--sample", str(rows), "--out", str(tmp_path / "bridge")])
    prepare = ["--data", str(rows), *pair, "--bridge", str(tmp_path / "bridge"), "--out", str(tmp_path / "data")]
    command("prepare")(prepare)
    first = scores(tmp_path / "first.json", *pair, "--data", str(tmp_path / "data"))
    for models in (pair, [str(lab.student), str(lab.teacher)]):
        found = scores(tmp_path / "found.json", *models, "--data", str(rows))
        assert [one["side"] for one in found["models"]] == ["student", "teacher"]
        assert [one["bits_per_byte"] for one in found["models"]] == [one["bits_per_byte"] for one in first["models"]]


def test_an_autoregressive_model_alone(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no mask token: what it gets is transformers' own likelihood of the response."""
    path = ar_folder(tmp_path / "model", "qwen3")
    named = ["--data", str(rows), "--teacher-context", "causal"]
    with pytest.raises(ValueError, match="no diffusion bound; name it with --teacher and add --teacher-context causal"):
        evaluate([str(path), *named])
    other = tmp_path / "gpt2"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    for model in ([str(other)], ["--teacher", str(other)]):
        with pytest.raises(ValueError, match="model_type 'gpt2' is not one of "):
            evaluate([*model, *named])
    monkeypatch.setattr(held_out, "TemporaryDirectory", lambda prefix: nullcontext(str(tmp_path / "made")))
    out = tmp_path / "found.json"
    evaluate(["--teacher", str(path), *named, "--per-sample", "--mc-samples", "64", "--json", str(out)])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data, expected = PreparedData.open(tmp_path / "made" / "data"), []
    for side in (data.sample(number).student for number in range(len(data))):
        ids = torch.from_numpy(side.ids.astype("int64"))
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        expected.append(-logp[side.prompt - 1 : side.content_end].sum().item())
    (one,) = json.loads(out.read_text())["models"]
    assert sum(one["per_sample"]["nats"]) == pytest.approx(sum(expected), rel=0.02)  # an estimate: tokens are drawn
    run = {"student": str(path), "data": str(data.folder), "out": str(tmp_path / "run"), "strategy": "bd3lm"}
    with pytest.raises(ValueError, match=r"prepared for a student without a mask token: .* again with --student-mask"):
        read_run_inputs(from_flat(run), 1)


def test_what_models_do_not_share_is_refused(lab: Lab, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(lab.student, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "block_size": 2 * config["block_size"]}))
    with pytest.raises(ValueError, match=r"has blocks of 4 tokens and .*other of 8; prepare the data for one size"):
        evaluate([str(lab.student), str(other), "--data", str(rows)])
    with pytest.raises(ValueError, match="have different tokenizers; score at most two"):
        evaluate(["--student", str(lab.student), "--student", str(lab.teacher), "--data", str(rows)])
    with pytest.raises(ValueError, match=r"gone.jsonl: no such file or folder \(--data\)"):
        evaluate([str(lab.student), "--data", str(tmp_path / "gone.jsonl")])
