"""Checkpoint -> release: the same numbers, the whole provenance, and nothing at all when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megatron_tide.bridge import load_tokenizer
from megatron_tide.lock import RunLock
from megatron_tide.models import load_model
from megatron_tide.release import Options, convert, parse_size
from megatron_tide.release import convert as convert_function
from tests.release.conftest import assert_refused, convert_module
from tests.support.lab import BLOCK, Lab, moved, stored, write_checkpoint

CODE = {"backbone_a2d.py", "generation_a2d.py", "decoding_a2d.py", "sampling_a2d.py"}


def test_weights_are_the_training_weights_rounded(lab: Lab, checkpoint: Path, release: Path) -> None:
    tensors, expected = stored(release), moved(lab.student, seed=1)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_a_student_of_llamas_shape_is_released_too(lab: Lab, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.llama(tmp_path / "start"), data=lab.student_data)
    out = tmp_path / "out"
    assert convert_function(checkpoint, out, Options())["largest_logit_difference"] == 0.0
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("a2d-llama", ["A2DLlamaLMHeadModel"])
    assert config["auto_map"]["AutoModelForMaskedLM"] == "a2d_llama.A2DLlamaLMHeadModel"
    assert {file.name for file in out.glob("*.py")} == CODE | {"a2d_llama.py"}


def test_parity_is_recorded_with_what_was_compared(release: Path) -> None:
    parity = json.loads((release / "parity.json").read_text())
    assert parity["largest_logit_difference"] == 0.0
    assert parity["logit_rows"] > 3 * BLOCK
    assert parity["greedy_tokens"] >= 3 * 2 * BLOCK + 3
    assert "step 20" in parity["compared_with"]


def test_config_says_how_to_generate(lab: Lab, release: Path) -> None:
    tokenizer = load_tokenizer(lab.student)
    for file in ("config.json", "generation_config.json"):
        config = json.loads((release / file).read_text())
        assert (config["block_size"], config["mask_token_id"]) == (BLOCK, tokenizer.mask_id)
        assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    assert json.loads((release / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_is_the_starting_folders(lab: Lab, release: Path) -> None:
    assert load_tokenizer(release).fingerprint == load_tokenizer(lab.student).fingerprint
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (release / name).read_bytes() == (lab.student / name).read_bytes()
    ours, theirs = (json.loads((f / "tokenizer_config.json").read_text()) for f in (release, lab.student))
    assert ours == theirs | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 knows as well
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": json.loads((release / "config.json").read_text())["max_position_embeddings"],
    }


def test_another_chat_template_than_the_runs_is_not_released(lab: Lab, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(lab.student, start)
    trained = write_checkpoint(lab, tmp_path / "run", start=start, data=lab.data)
    (start / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert_refused(trained, tmp_path / "out", "its chat template is not the one")


def test_every_file_may_be_read_by_whoever_may_read_the_config(release: Path) -> None:
    assert len({file.stat().st_mode for file in release.iterdir()}) == 1


def test_loads_through_transformers_and_generates(
    lab: Lab, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(release, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(release, trust_remote_code=True, dtype=torch.float32).eval()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]])
    ours = load_model(release)
    assert torch.equal(model.generate(ids, max_new_tokens=20), ours.generate(ids, max_new_tokens=20))


def test_card_tells_the_whole_story(lab: Lab, checkpoint: Path, release: Path) -> None:
    card = (release / "README.md").read_text()
    run = json.loads((checkpoint / "trainer.json").read_text())["run"]
    assert card.startswith("---\nlicense: apache-2.0\n")
    for fact in (
        "# tiny-student",
        "tide-cross",
        run["bridge_fingerprint"],
        run["data_fingerprint"],
        run["fingerprint"],
        "AutoModelForCausalLM",
        "trust_remote_code=True",
        "## Limits",
        "## Licence",
        "## Parity",
        "| loss/total | 2.25 |",
        "| train/lr | 0.5 |",
        "samples seen: 320",
        "2604.26951",
    ):
        assert fact in card, fact
    for setting, value in run["config"]["train"].items():
        assert value is None or f"| {setting} |" in card, (setting, value)
    assert str(lab.student.parent) not in card + (release / "provenance.json").read_text()


def test_card_names_hub_models_as_bases() -> None:
    from megatron_tide.hub import public_name

    assert public_name("org/model-1") == "org/model-1"
    assert public_name("/home/someone/secret/model-1") == "model-1"
    assert public_name("runs/quickstart/student") == "student"


def test_code_in_the_cards_example_runs(release: Path) -> None:
    card = (release / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"NAME/REPO"', repr(str(release)))
    assert str(release) in code
    printed: list[str] = []
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=9"), "card", "exec"), {"print": printed.append})
    assert len(printed) == 1


@pytest.mark.usefixtures("no_gate")
def test_shards_and_fp32(lab: Lab, checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", Options(dtype="float32", max_shard_bytes=20_000))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    expected = moved(lab.student, seed=1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(tmp_path / "out").items())


@pytest.mark.usefixtures("no_gate")
def test_a_run_folder_gives_its_newest_step(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, seed in ((20, 1), (100, 2)):
        write_checkpoint(lab, run, start=lab.student, data=lab.data, step=step, seed=seed)
    (run / "step-00000200").mkdir()  # without checksums it is none
    convert(run, tmp_path / "out", Options(dtype="float32"))
    expected = moved(lab.student, seed=2)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(tmp_path / "out").items())


def test_a_teacher_goes_out_in_its_public_format(lab: Lab, tmp_path: Path) -> None:
    """Stacked experts become the public per-expert keys; what is not trained comes from the starting folder."""
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=lab.teacher, data=lab.teacher_data)
    convert(checkpoint, tmp_path / "out", Options(dtype="float32"))
    released, start = stored(tmp_path / "out"), stored(lab.teacher)
    assert {name: tensor.shape for name, tensor in released.items()} == {n: t.shape for n, t in start.items()}
    for name, tensor in released.items():
        assert torch.equal(tensor, start[name]) == name.endswith("expert_bias"), name
    expected = moved(lab.teacher, seed=1)["model.layers.1.mlp.experts.up_proj"]
    assert torch.equal(released["model.layers.1.mlp.experts.3.up_proj.weight"], expected[3])
    assert not list((tmp_path / "out").glob("*.py"))


# --- what must stop a conversion, and leave nothing ---


@pytest.mark.usefixtures("no_gate")
def test_an_existing_folder_is_kept_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert_refused(checkpoint, out, "--overwrite")
    convert(checkpoint, out, Options(overwrite=True))
    assert (out / "parity.json").exists()
    assert (out / "config.json").read_text() != "mine"


@pytest.mark.usefixtures("no_gate")
def test_two_conversions_to_one_folder_do_not_mix(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    with RunLock(tmp_path, ".hf.lock"), pytest.raises(ValueError, match="in use by"):
        convert(checkpoint, out, Options())
    assert list(tmp_path.iterdir()) == []
    convert(checkpoint, out, Options())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_overwrite_does_not_remove_what_is_no_model(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert_refused(checkpoint, tmp_path / "out", "not a model", overwrite=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "model.safetensors").write_text("weights that nothing makes again")
    assert_refused(checkpoint, tmp_path / "out", "not a model", overwrite=True)
    (tmp_path / "out" / "provenance.json").write_text("{}")
    made_from = {"overwrite": True, "base_model": str(tmp_path / "out")}
    assert_refused(checkpoint, tmp_path / "out", "is what the release is made from", **made_from)


def test_overwrite_keeps_the_old_release_when_the_new_one_fails(
    checkpoint: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(release, tmp_path / "out")

    def refuse(*_: Any) -> None:
        raise ValueError("parity gate: no")

    monkeypatch.setattr(convert_module, "check_parity", refuse)
    assert_refused(checkpoint, out, "parity gate", overwrite=True)


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        convert(checkpoint, tmp_path / "out", Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.json", "exp_avg.safetensors"])
def test_a_corrupt_checkpoint_is_named(checkpoint: Path, tmp_path: Path, file: str) -> None:
    corrupt = shutil.copytree(checkpoint, tmp_path / "step-00000020")
    content = bytearray((corrupt / file).read_bytes())
    content[len(content) // 2] ^= 1
    (corrupt / file).write_bytes(content)
    assert_refused(corrupt, tmp_path / "out", f"{file}: corrupt")
    (corrupt / file).unlink()
    assert_refused(corrupt, tmp_path / "out", f"{file}|no complete checkpoint")


def test_what_is_no_checkpoint_is_said_so(lab: Lab, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", tmp_path / "out", "no such folder")
    assert_refused(lab.student, tmp_path / "out", "no complete checkpoint")


@pytest.mark.usefixtures("no_gate")
def test_a_start_that_is_gone_or_another_is_named(lab: Lab, tmp_path: Path) -> None:
    start = shutil.copytree(lab.student, tmp_path / "start")
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=start, data=lab.data)
    start.rename(tmp_path / "elsewhere")
    assert_refused(checkpoint, tmp_path / "out", "--base-model")
    assert_refused(checkpoint, tmp_path / "out", "tokenizer|shape|holds", base_model=str(lab.teacher))
    convert(checkpoint, tmp_path / "out", Options(base_model=str(tmp_path / "elsewhere")))


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 MiB", "700")] == [5 * 10**9, 3 * 2**19, 700]
    for text in ("5 apples", "", "-1GB", "0"):
        with pytest.raises(ValueError, match="--max-shard-size"):
            parse_size(text)


# --- code and secrets of the folder that training began from ---

EVIL = """
import json, os, pathlib
pathlib.Path({canary!r}).write_text(json.dumps(dict(os.environ)))
from transformers import PreTrainedTokenizerFast

class Evil(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_the_base_model_is_neither_run_nor_released(lab: Lab, tmp_path: Path) -> None:
    base, canary = shutil.copytree(lab.student, tmp_path / "base"), tmp_path / "canary"
    names = ("tokenizer_fast.py", "tokenizer.py", "chat_template.py", "x.tiktoken.py", "tokenization_evil.py")
    for name in names:
        (base / name).write_text(EVIL.format(canary=str(canary)))
    for name, auto_map in (
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenizer_fast.Evil", "tokenizer_fast.Evil"]}),
        ("config.json", {"AutoModelForMaskedLM": "tokenizer_fast.Evil", "AutoConfig": "tokenizer_fast.Evil"}),
    ):
        config = json.loads((base / name).read_text())
        config |= {"auto_map": auto_map, "name_or_path": "/home/someone", "attn_implementation": "evil/kernels"}
        (base / name).write_text(json.dumps(config))
    token = {"content": "<|endoftext|>", "auto_map": "Evil"}
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": token, "auto_map": "Evil", "x": "Evil"}))
    (base / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "tokenizer_fast.Evil"}}))
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=base, data=lab.data)
    out = tmp_path / "out"
    convert(checkpoint, out, Options())
    assert not canary.exists()
    assert {file.name for file in out.glob("*.py")} == CODE | {"a2d_qwen3.py"}
    whole = "".join(file.read_text() for file in out.glob("*.json"))
    for word in ("Evil", "someone", "evil/kernels"):
        assert word not in whole
    kinds = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"}
    assert set(json.loads((out / "config.json").read_text())["auto_map"]) == kinds


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_to_a_file_elsewhere_is_not_released(lab: Lab, tmp_path: Path, name: str) -> None:
    base, elsewhere = shutil.copytree(lab.student, tmp_path / "base"), tmp_path / "private"
    (base / name).rename(elsewhere)
    (base / name).symlink_to("../private")
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=base, data=lab.data)
    assert_refused(checkpoint, tmp_path / "out", "outside its folder")
    (base / name).unlink()
    (base / "own").write_bytes(elsewhere.read_bytes())
    (base / name).symlink_to("own")  # within the folder it may be
    convert(checkpoint, tmp_path / "out", Options(dtype="float32", skip_parity=True))
    assert not (tmp_path / "out" / name).is_symlink()


@pytest.mark.usefixtures("no_gate")
def test_a_teachers_configuration_goes_out_by_the_list_of_keys(lab: Lab, tmp_path: Path) -> None:
    base = shutil.copytree(lab.teacher, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    foreign = {"auto_map": {"AutoModel": "evil/repo--m.M"}, "_name_or_path": "/home/someone", "custom": ["x"]}
    (base / "config.json").write_text(json.dumps(config | foreign | {"norm_topk_prob": True}))
    checkpoint = write_checkpoint(lab, tmp_path / "run", start=base, data=lab.teacher_data)
    convert(checkpoint, tmp_path / "out", Options())
    released = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not released.keys() & foreign.keys()
    assert released["norm_topk_prob"] is True
