"""Reading what the trainer wrote, and saying which family a path holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tide.training_checkpoint import family_at, open_model
from tests.support.lab import Lab, make_lab, write_checkpoint
from tests.support.models import tiny_student_config, write_hub_folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"))


def test_a_path_has_one_family(lab: Lab, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    causal = write_hub_folder(tmp_path / "qwen3", tiny_student_config(model_type="qwen3"))
    found = {path: family_at(path) for path in (lab.student, lab.teacher, step, step.parent, causal)}
    assert [family.generation for family in found.values()] == ["block_diffusion"] * 4 + ["autoregressive"]
    assert found[step] is found[lab.student]
    for path, family in found.items():
        assert isinstance(open_model(path).model, family.module)
    with pytest.raises(ValueError, match="no such folder"):
        family_at(tmp_path / "nowhere")


def test_a_run_that_began_from_a_causal_model_is_a_block_diffusion_model(lab: Lab, tmp_path: Path) -> None:
    config = (lab.student / "config.json").read_text()
    base = tmp_path / "causal"
    base.mkdir()
    for file in lab.student.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "config.json").write_text(config.replace('"a2d-qwen3"', '"qwen3"'))
    assert family_at(base).generation == "autoregressive"
    step = write_checkpoint(lab, tmp_path / "run", start=base, data=lab.data)
    assert family_at(step) is family_at(lab.student)
    assert isinstance(open_model(step).model, family_at(lab.student).module)
