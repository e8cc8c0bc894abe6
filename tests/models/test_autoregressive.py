"""Baselines are folders of strangers: transformers reads safetensors of the folder itself, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_tide.models.autoregressive import load_autoregressive
from tests.support.ar_models import ar_folder


class Runs:
    """What a pickle may hold."""

    def __reduce__(self) -> Any:
        return os.system, ("echo unpickled > unpickled",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ar_folder(tmp_path / "baseline", "qwen3")


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_autoregressive(folder, torch.float32, "cpu")
    assert "\n" not in str(caught.value)


def test_pickles_are_not_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(load_file(folder / "model.safetensors") | {"x": Runs()}, folder / "pytorch_model.bin")
    load_autoregressive(folder, torch.float32, "cpu")
    (folder / "model.safetensors").unlink()
    refuse(folder, "only pickled weights")
    assert not (tmp_path / "unpickled").exists()


def test_weights_of_another_folder_are_not_read(folder: Path) -> None:
    keys = [*load_file(folder / "model.safetensors")]
    shutil.move(folder / "model.safetensors", folder.parent / "private.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "../private.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, "not a file in the same folder")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["generation_config.json", "adapter_config.json", "model.safetensors"])
def test_a_fifo_hangs_nothing(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refuse(folder, f"{name}: not a regular file")


def test_an_adapter_names_no_other_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/base"}))
    refuse(folder, "holds an adapter")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer is 1000000000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"attn_implementation": "evil/kernel"}, "names code of the hub"),
        ({"_attn_implementation": "evil/kernel@v1"}, "names code of the hub"),
        ({"hidden_size": "x"}, "cannot be read as a causal language model"),
        ({"rope_parameters": [1]}, "cannot be read as a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be read as a causal language model"),
    ],
)
def test_a_configuration_of_no_model_is_one_line(folder: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refuse(folder, words)


@pytest.mark.parametrize("key", ["top_k", "temperature", "num_beams", "max_length"])
def test_a_number_of_generation_that_is_text_is_one_line(folder: Path, key: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps({key: "many"}))
    refuse(folder, f"generation_config.json: {key}: str, where a number is expected")
