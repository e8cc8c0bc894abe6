"""Folders in hub format: in, out, bit for bit, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import megatron_tide.models
from megatron_tide.models import fresh_model, load_model, parameter_count, resolve_folder, write_folder
from megatron_tide.models.shards import ShardedFolder, same_model
from tests.support.models import (
    hub_tensors,
    tiny_llama_config,
    tiny_opdlm_config,
    tiny_sdar_config,
    tiny_student_config,
    tiny_teacher_config,
    tiny_wedlm_config,
    write_hub_folder,
)

CONFIGS = Path(megatron_tide.models.__file__).parent / "configs"
BOTH = [tiny_student_config(), tiny_teacher_config()]
NAMES = ["student", "teacher"]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


OTHERS = {
    "wedlm": tiny_wedlm_config(),
    "sdar": tiny_sdar_config(),
    "opdlm": tiny_opdlm_config(),
    "llama-student": tiny_llama_config(),
    "llama": tiny_llama_config(model_type="llama"),
    "qwen3": tiny_student_config(model_type="qwen3", tie_word_embeddings=False),
}


@pytest.mark.parametrize("config", [*BOTH, *OTHERS.values()], ids=[*NAMES, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_comes_in_goes_out_bit_for_bit(
    tmp_path: Path, config: dict[str, Any], dtype: torch.dtype, shards: int
) -> None:
    source = write_hub_folder(tmp_path / "in", config, dtype=dtype, shards=shards)
    write_folder(load_model(source, dtype), tmp_path / "out", max_shard_bytes=20_000)
    same(stored(tmp_path / "out"), hub_tensors(config, dtype=dtype))
    # bf16 weights held in fp32 for training are the same numbers when written back.
    write_folder(load_model(source), tmp_path / "cast", dtype=dtype)
    same(stored(tmp_path / "cast"), hub_tensors(config, dtype=dtype))


def test_shards_keep_their_limit_and_their_index(tmp_path: Path) -> None:
    config = tiny_teacher_config()
    source = write_hub_folder(tmp_path / "in", config)
    write_folder(load_model(source), tmp_path / "out", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == hub_tensors(config).keys()
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / name)
        assert set(tensors) == {key for key, file in index["weight_map"].items() if file == name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
        with safe_open(tmp_path / "out" / name, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
def test_config_survives_the_round_trip(tmp_path: Path, config: dict[str, Any]) -> None:
    config = {**config, "router_dtype": "fp32"} if config["model_type"] == "llada2_moe" else config
    write_folder(load_model(write_hub_folder(tmp_path / "in", config)), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert written["torch_dtype"] == "float32"


@pytest.mark.parametrize("config", [OTHERS["sdar"], OTHERS["opdlm"]], ids=["sdar", "opdlm"])
def test_a_public_config_keeps_what_it_says_of_the_model(tmp_path: Path, config: dict[str, Any]) -> None:
    """Code, attention kernels and what only their own training reads are left out."""
    model = load_model(write_hub_folder(tmp_path / "in", config))
    write_folder(model, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    left_out = {"auto_map", "attn_implementation", "fuse_cross_entropy", "transformers_version", "dtype", "layer_types"}
    assert {key: written.get(key, "missing") for key in config if key not in left_out} == {
        key: value for key, value in config.items() if key not in left_out
    }
    assert not left_out & set(written)
    ids = torch.arange(3, 12)[None]
    full = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    plain = load_model(write_hub_folder(tmp_path / "qwen3", {**config, "model_type": "qwen3"}))
    torch.testing.assert_close(model(ids).logits, plain(ids, attention_mask=full).logits)


def test_stacked_experts_hold_the_experts_in_order(tmp_path: Path) -> None:
    config = tiny_teacher_config()
    model, tensors = load_model(write_hub_folder(tmp_path, config)), hub_tensors(config)
    for expert in range(config["num_experts"]):
        key = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(model.model.layers[2].mlp.experts.down_proj[expert], tensors[key])
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_checkpoint_may_carry_the_head_as_well_if_it_is_equal(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path, tiny_student_config())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(folder)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "-"}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


IN_A_LAYER = sum(key.startswith("model.layers.2.") for key in hub_tensors(tiny_teacher_config()))
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "other model": (edit_config(model_type="gpt2"), "model_type 'gpt2' is not one of a2d-llama, a2d-qwen3, llada2_moe"),
    "lacking key": (edit_config(num_experts="-", rope_theta="-"), "missing num_experts, rope_theta"),
    "groups": (edit_config(n_group=3), "n_group 3 must divide num_experts 16"),
    "biases": (edit_config(use_bias=True), "use_bias = True is not supported"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "pickles": (only_pickle, r"only pickled weights \(pytorch_model\.bin\)"),
    "truncated": (truncate, r"model\.safetensors: cannot be read"),
    "missing tensor": (edit_tensors(lambda t: t.pop(EXPERT)), rf"lacks 1 tensor\(s\) \({EXPERT}\)"),
    "unexpected tensor": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(1))),
        r"has unexpected 1 tensor\(s\) \(extra\)",
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({EXPERT: torch.zeros(3, 5)})), rf"{EXPERT} has shape \[3, 5\]"),
    "whole numbers": (
        edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int32)})),
        f"{EXPERT} holds I32, not floating-point numbers",
    ),
    "more layers": (
        edit_config(num_hidden_layers=4),
        rf"lacks {IN_A_LAYER} tensor\(s\) \(model\.layers\.3.*, \.\.\.\)",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    folder = write_hub_folder(tmp_path / "in", tiny_teacher_config())
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("changes", [{"vocab_size": "many"}, {"head_dim": "-"}, {"rope_theta": "-"}])
def test_bad_student_configs_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_hub_folder(tmp_path / "in", tiny_student_config())
    edit_config(**changes)(folder)
    with pytest.raises(ValueError, match=next(iter(changes))) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_bad_indices_are_refused(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "in", tiny_student_config(), shards=2)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    (folder / "model-00002-of-00002.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: missing"):
        load_model(folder)
    index.write_text(good.replace("model-00002-of-00002.safetensors", "../secret.safetensors"))
    with pytest.raises(ValueError, match="not a file in the same folder"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(folder)
    for odd in (3, None, ["x"], {"x": 1}, "", "a\0b", "x" * 5000):
        index.write_text(json.dumps({"weight_map": {"some.weight": odd}}))
        with pytest.raises(ValueError, match=r"for 'some\.weight' is no file name"):
            load_model(folder)


def test_weights_that_may_not_be_read_are_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_hub_folder(tmp_path / "in", tiny_teacher_config())
    monkeypatch.setattr("megatron_tide.models.shards.os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"model\.safetensors: you may not read it"):
        load_model(folder)


def test_a_key_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "in", tiny_student_config(), shards=2)
    name = "model-00002-of-00002.safetensors"
    tensors = load_file(folder / name)
    gone = tensors.popitem()[0]
    save_file(tensors, folder / name)
    with pytest.raises(ValueError, match=gone):
        load_model(folder)


def test_a_folder_that_holds_a_model_is_not_overwritten(tmp_path: Path) -> None:
    source = write_hub_folder(tmp_path / "in", tiny_student_config())
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already contains a model"):
        write_folder(load_model(source), source)
    assert (source / "model.safetensors").read_bytes() == before


def test_names_that_are_no_folder_are_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    for name in (
        tmp_path / "nowhere",
        "nowhere",
        "./a/b",
        "~/a",
        f"{tmp_path.name}/no-model",
        "a/model.safetensors.json",
    ):
        with pytest.raises(ValueError, match="no such folder"):
            resolve_folder(name)


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="nobody/nothing: no such folder, and not found on the hub") as caught:
        resolve_folder("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "billions"), [("llada2_mini", 16.256), ("qwen3_0.6b", 0.596), ("wedlm_8b", 8.191)])
def test_true_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert parameter_count(CONFIGS / f"{name}.json") / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("config", BOTH, ids=NAMES)
def test_fresh_weights_are_a_function_of_the_seed(config: dict[str, Any]) -> None:
    state = torch.random.get_rng_state()
    one, same_seed, other = (fresh_model(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in one.items():
        assert torch.equal(tensor, same_seed[name])
        assert torch.isfinite(tensor).all()
    changed = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert all(name in changed for name in one if tensor_is_matrix(one[name]))


def tensor_is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1


def test_fingerprints_of_large_folders_and_of_earlier_versions_are_compared_by_their_first_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hub_folder(tmp_path / "a", tiny_teacher_config(), shards=2)
    whole = ShardedFolder(folder).fingerprint()
    monkeypatch.setattr("megatron_tide.models.shards.WHOLE", 100)
    part = ShardedFolder(folder).fingerprint()
    assert whole.startswith(f"{part}-")
    assert same_model(part, whole)
    assert same_model(None, None)
    for other in (None, "", part[:-1], f"{part}-{part}", 7):
        assert not same_model(whole, other)


def test_a_folders_fingerprint_follows_configuration_and_weights(tmp_path: Path) -> None:
    config = tiny_teacher_config()
    folder = write_hub_folder(tmp_path / "a", config, shards=3)
    before = ShardedFolder(folder).fingerprint()
    assert ShardedFolder(write_hub_folder(tmp_path / "b", config, shards=3)).fingerprint() == before
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"transformers_version": "9"}, indent=3))
    assert ShardedFolder(folder).fingerprint() == before
    (folder / "config.json").write_text(json.dumps(described | {"rope_theta": 7.0}))
    assert ShardedFolder(folder).fingerprint() != before
    (folder / "config.json").write_text(json.dumps(described))
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        largest = max(tensors, key=lambda key: tensors[key].numel())
        tensors[largest] = tensors[largest] * 1.5  # trained further
        whole = shard.read_bytes()
        save_file(tensors, shard, metadata={"format": "pt"})
        assert ShardedFolder(folder).fingerprint() != before
        one_bit = bytearray(whole)
        one_bit[-len(whole) // 5] ^= 1
        shard.write_bytes(one_bit)
        assert not same_model(ShardedFolder(folder).fingerprint(), before)
        shard.write_bytes(whole)
    assert ShardedFolder(folder).fingerprint() == before
    shard.write_bytes(whole[:6] + b"\xff\xff" + whole[8:])
    with pytest.raises(ValueError, match=f"{shard.name}: cannot be read"):
        ShardedFolder(folder).fingerprint()


def test_a_folders_fingerprint_says_which_of_two_tensors_of_one_name_is_read(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path, tiny_student_config(), shards=2)
    index = folder / "model.safetensors.index.json"
    file_of = json.loads(index.read_text())["weight_map"]
    (key, name), (_, other) = list(file_of.items())[:2]
    tensors = load_file(folder / other)
    save_file(tensors | {key: load_file(folder / name)[key] * 2}, folder / other, metadata={"format": "pt"})
    found = []
    for place in (name, other):
        index.write_text(json.dumps({"weight_map": file_of | {key: place}}))
        found.append((ShardedFolder(folder).fingerprint(), load_model(folder).get_parameter(key)))
    assert not torch.equal(found[0][1], found[1][1])
    assert not same_model(found[0][0], found[1][0])
