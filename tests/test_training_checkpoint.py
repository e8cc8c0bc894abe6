"""How the model at a path generates, and which module opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tide.models.a2d_qwen3 import A2DQwen3LMHeadModel
from megatron_tide.models.causal import Qwen3ForCausalLM
from megatron_tide.models.llada2 import LLaDA2MoeModelLM
from megatron_tide.training_checkpoint import CHECKSUMS, STATE, WEIGHTS, generation_of, open_model, verify
from tests.support.lab import Lab, make_lab, write_checkpoint
from tests.support.models import tiny_student_config, write_hub_folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"))


def test_one_place_decides_what_a_path_holds(lab: Lab, tmp_path: Path) -> None:
    step = write_checkpoint(lab, tmp_path / "run", start=lab.student, data=lab.data)
    causal = write_hub_folder(tmp_path / "qwen3", tiny_student_config(model_type="qwen3"))
    modules = dict.fromkeys((lab.student, step, step.parent), A2DQwen3LMHeadModel)
    modules |= {lab.teacher: LLaDA2MoeModelLM, causal: Qwen3ForCausalLM}
    for path, module in modules.items():
        assert isinstance(open_model(path).model, module)
        assert generation_of(path) == ("autoregressive" if path == causal else "block_diffusion")
    with pytest.raises(ValueError, match="no such folder"):
        generation_of(tmp_path / "nowhere")


def test_a_run_that_began_from_a_causal_model_is_a_block_diffusion_model(lab: Lab, tmp_path: Path) -> None:
    base = tmp_path / "causal"
    base.mkdir()
    for file in lab.student.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = (lab.student / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"a2d-qwen3"', '"qwen3"'))
    assert generation_of(base) == "autoregressive"
    step = write_checkpoint(lab, tmp_path / "run", start=base, data=lab.data)
    assert generation_of(step) == "block_diffusion"
    assert isinstance(open_model(step).model, A2DQwen3LMHeadModel)


@pytest.mark.parametrize(
    ("sums", "said"),
    [({}, "no readable checksums.json"), ({"../secret": "0"}, r"checksums.json: names '\.\./secret', which is not")],
    ids=["no files", "another folder's"],
)
def test_checksums_cover_the_checkpoint_and_nothing_else(tmp_path: Path, sums: dict[str, str], said: str) -> None:
    files = dict.fromkeys((WEIGHTS, STATE), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / CHECKSUMS).write_text(json.dumps(files))
    verify(tmp_path)
    (tmp_path / CHECKSUMS).write_text(json.dumps(files | sums if sums else sums))
    with pytest.raises(ValueError, match=said):
        verify(tmp_path)
