"""How the model at a path generates, and which module opens it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_tide.files import sha256_file
from megatron_tide.models.a2d_qwen3 import A2DQwen3LMHeadModel
from megatron_tide.models.causal import Qwen3ForCausalLM
from megatron_tide.models.llada2 import LLaDA2MoeModelLM
from megatron_tide.train.checkpoint import _prune
from megatron_tide.training_checkpoint import (
    CHECKSUMS,
    STATE,
    WEIGHTS,
    generation_of,
    newest_complete,
    open_checkpoint,
    open_model,
    step_folders,
    verify,
)
from tests.support.lab import Lab, write_checkpoint
from tests.support.models import tiny_student_config, write_hub_folder


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
    with pytest.raises(ValueError, match=r"step-.*not found \(.*no config\.json there\); set --base-model"):
        open_checkpoint(step, str(tmp_path))


@pytest.mark.parametrize(
    ("sums", "said"),
    [({}, "no readable checksums.json"), ({"../secret": "0"}, r"checksums.json: names '\.\./secret', which is not")],
    ids=["no files", "another folder's"],
)
def test_checksums_cover_the_checkpoint_and_nothing_else(tmp_path: Path, sums: dict[str, str], said: str) -> None:
    tmp_path = _empty_step(tmp_path, "step-00000001")
    files = json.loads((tmp_path / CHECKSUMS).read_text())
    (tmp_path / CHECKSUMS).write_text(json.dumps(files))
    verify(tmp_path)
    (tmp_path / CHECKSUMS).write_text(json.dumps(files | sums if sums else sums))
    with pytest.raises(ValueError, match=said):
        verify(tmp_path)


def test_a_file_that_is_cut_is_found_before_any_is_read_to_its_end(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = write_checkpoint(lab, tmp_path, start=lab.student, data=lab.data)
    whole = (step / "exp_avg.safetensors").read_bytes()
    (step / "exp_avg.safetensors").write_bytes(whole[:-1] + b"?")
    with pytest.raises(ValueError, match=r"exp_avg.safetensors: corrupt \(its checksum differs"):
        verify(step)
    (step / "exp_avg.safetensors").write_bytes(whole[:-1])
    monkeypatch.setattr("megatron_tide.training_checkpoint.sha256_files", lambda paths: pytest.fail("was read"))
    with pytest.raises(ValueError, match=r"exp_avg.safetensors: corrupt \("):
        verify(step)


def _empty_step(run: Path, name: str) -> Path:
    """A folder that passes as a checkpoint as far as its files and checksums go."""
    folder = run / name
    folder.mkdir(parents=True)
    (folder / STATE).write_bytes(b"{}")
    save_file({}, folder / WEIGHTS)
    sums = {file: sha256_file(folder / file) for file in (WEIGHTS, STATE)}
    (folder / CHECKSUMS).write_text(json.dumps(sums))
    return folder


def test_pruning_removes_nothing_but_older_checkpoints(tmp_path: Path) -> None:
    steps = [_empty_step(tmp_path, f"step-{number:08d}") for number in (10, 20, 30)]
    (tmp_path / "step-best").symlink_to(steps[0])
    (tmp_path / "step-99999999").symlink_to(steps[0])
    elsewhere = _empty_step(tmp_path / "other", "step-00000001")
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    others = [_empty_step(tmp_path, name) for name in ("step-9", "step-final", "step-000000400", "step-00000010.bak")]
    (tmp_path / "step-00000040").mkdir()  # corrupt: resuming went past it
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000050").write_text("a file")
    _prune(tmp_path, steps[-1], keep=1)
    assert [step.exists() for step in steps] == [False, False, True]
    assert all((folder / WEIGHTS).is_file() for folder in (*others, elsewhere))
    assert (tmp_path / "step-best").is_symlink()
    assert (tmp_path / "step-00000040").is_dir()
    assert step_folders(tmp_path) == [tmp_path / f"step-{n:08d}" for n in (5, 30, 40)]


def test_pruning_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    steps = [_empty_step(tmp_path, f"step-{number:08d}") for number in (10, 20, 30, 40)]
    _prune(tmp_path, steps[1], keep=1)  # resumed from an early step
    assert [step.exists() for step in steps] == [False, True, True, True]


def test_links_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-best").symlink_to(_empty_step(tmp_path / "other", "step-00000001"))
    _empty_step(tmp_path, "step-zz")
    told: list[str] = []
    assert newest_complete(tmp_path, told.append) is None
    assert told == []
    with pytest.raises(ValueError, match="no complete checkpoint"):
        open_checkpoint(tmp_path)
    step = _empty_step(tmp_path, "step-00000007")
    assert newest_complete(tmp_path, told.append) == step


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("/etc/hostname")])
def test_a_file_that_no_checksum_vouches_for_is_refused(lab: Lab, tmp_path: Path, make: Callable[[Path], None]) -> None:
    step = write_checkpoint(lab, tmp_path, start=lab.student, data=lab.data)
    (step / "exp_avg.safetensors").unlink()
    sums = json.loads((step / CHECKSUMS).read_text())
    del sums["exp_avg.safetensors"]
    (step / CHECKSUMS).write_text(json.dumps(sums))
    make(step / "exp_avg.safetensors")
    with pytest.raises(ValueError, match=f"exp_avg.safetensors: not in {CHECKSUMS}"):
        verify(step)


@pytest.mark.parametrize("sums", ["{}", "[" * 100_000, '{"../x": "0"}', "\ud800", "null"])
def test_checksums_that_vouch_for_nothing_are_refused(tmp_path: Path, sums: str) -> None:
    step = _empty_step(tmp_path, "step-00000007")
    (step / CHECKSUMS).write_bytes(sums.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=CHECKSUMS) as caught:
        verify(step)
    assert "\n" not in str(caught.value)
