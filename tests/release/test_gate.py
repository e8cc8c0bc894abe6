"""The parity gate: what fails it is not released, and its process gets no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.data import PreparedData
from megatron_tide.release import Options
from megatron_tide.release import convert as convert_function
from megatron_tide.release import parity as parity_module
from tests.release.conftest import assert_refused, convert_module
from tests.support.lab import BLOCK, Lab


def test_the_gate_can_be_left_out_for_a_start_of_further_runs(
    checkpoint: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "check_parity", None)
    assert convert_function(checkpoint, tmp_path / "tiny-student", Options(skip_parity=True)) == {}
    names = {path.name for path in release.iterdir()} - {"parity.json"}
    assert {path.name for path in (tmp_path / "tiny-student").iterdir()} == names
    for name in names - {"README.md", "provenance.json"}:
        assert (tmp_path / "tiny-student" / name).read_bytes() == (release / name).read_bytes(), name
    ours, gated = (
        json.loads((folder / "provenance.json").read_text()) for folder in (tmp_path / "tiny-student", release)
    )
    assert ours.pop("card") != gated.pop("card")
    assert ours == gated
    assert "| not checked | converted with --skip-parity |" in (tmp_path / "tiny-student" / "README.md").read_text()


def test_a_wrong_weight_fails_the_gate(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert_module.export

    def broken(trained: Any, model: Any, tokenizer: Any, ids: Any, out: Path, **options: Any) -> None:
        from safetensors.torch import load_file, save_file

        whole(trained, model, tokenizer, ids, out, **options)
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] *= 1.02
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(convert_module, "export", broken)
    assert_refused(checkpoint, tmp_path / "out", "parity gate: logits.*differs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("from __future__", "import nothing_of_this_name\nfrom __future__", "nothing_of_this_name|fresh process"),
        ("import torch\n", "import torch\nimport megatron_tide\n", "megatron_tide|fresh process"),
        ("+ noise_RV).argmax(-1)", "+ noise_RV).argmin(-1)", "tokens.0 differs"),
    ],
)
def test_wrong_code_fails_the_gate(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, word: str
) -> None:
    whole = convert_module.export

    def broken(trained: Any, model: Any, tokenizer: Any, ids: Any, out: Path, **options: Any) -> None:
        whole(trained, model, tokenizer, ids, out, **options)
        file = next(path for path in sorted(out.glob("*a2d.py")) if old in path.read_text())
        file.write_text(file.read_text().replace(old, new, 1))

    monkeypatch.setattr(convert_module, "export", broken)
    assert_refused(checkpoint, tmp_path / "out", word)


def test_a_wrong_block_size_fails_the_gate(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert_module.export

    def broken(trained: Any, model: Any, tokenizer: Any, ids: Any, out: Path, **options: Any) -> None:
        whole(trained, model, tokenizer, ids, out, **options)
        for name in ("config.json", "generation_config.json"):
            config = json.loads((out / name).read_text())
            (out / name).write_text(json.dumps({**config, "block_size": BLOCK * 2}))

    monkeypatch.setattr(convert_module, "export", broken)
    assert_refused(checkpoint, tmp_path / "out", "parity gate: tokens")


def test_the_gate_looks_at_more_than_one_prompt(lab: Lab) -> None:
    """Prompts of different lengths, one of them longer than several blocks, with bytes of many kinds."""
    tokenizer = load_tokenizer(lab.student)
    lengths = [len(tokenizer.encode(c[0]["content"])) for c in parity_module.CONVERSATIONS]
    assert len(set(lengths)) == len(lengths)
    assert max(lengths) > 3 * PreparedData.open(lab.data).manifest["student"]["block"]


def test_the_fresh_process_gets_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PYTHON_KEYRING_TOKEN")
    secrets += ("DATABASE_URL", "SSH_AUTH_SOCK", "HTTPS_PROXY", "PIP_INDEX_URL", "HF_TOKEN_PATH", "TORCH_HUB_KEY")
    for name in secrets:
        monkeypatch.setenv(name, "secret-value")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    for files in (parity_module.ReleaseFiles(), parity_module.ReleaseFiles(auto_map={"AutoConfig": "a.B"})):
        environment = parity_module._environment(files, str(tmp_path))
        assert "secret-value" not in environment.values()
        assert environment["HOME"] == str(tmp_path)
        assert environment["MKL_CBWR"] == "COMPATIBLE"
