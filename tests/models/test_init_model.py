"""The init-model command: a folder that loads, is whole or absent, and is a function of config, tokenizer and seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_tide import cli
from megatron_tide.bridge import load_tokenizer
from megatron_tide.models import load_model
from megatron_tide.models.init_model import VOCAB_MULTIPLE
from tests.support.commands import command
from tests.support.models import tiny_student_config, tiny_teacher_config
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece

init_model = command("init-model")
OF_THE_TOKENIZER = ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id")
CASES = {"student": (tiny_student_config, train_byte_bpe), "teacher": (tiny_teacher_config, train_sentencepiece)}


@pytest.fixture(scope="module", params=sorted(CASES))
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a run, without --seed and --out."""
    shapes, train = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    values = {key: value for key, value in shapes().items() if key not in OF_THE_TOKENIZER}
    (folder / "shapes.json").write_text(json.dumps(values))
    train(folder / "tokenizer", TEXTS, 340)
    return ["--config", str(folder / "shapes.json"), "--tokenizer", str(folder / "tokenizer")]


def test_the_folder_loads_as_a_model_and_as_a_tokenizer(given: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    init_model([*given, "--seed", "3", "--out", str(out)])
    model, tokenizer = load_model(out), load_tokenizer(given[-1])
    assert load_tokenizer(str(out)).fingerprint == tokenizer.fingerprint
    config = model.config
    assert (config.mask_token_id, config.eos_token_id) == (tokenizer.mask_id, tokenizer.eos_id)
    assert config.pad_token_id == tokenizer.pad_id
    assert config.vocab_size % VOCAB_MULTIPLE == 0
    assert 0 <= config.vocab_size - tokenizer.vocab_size < VOCAB_MULTIPLE
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    (out / "new").touch()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # weights may be read like all the rest


def test_the_seed_decides_the_bytes(given: list[str], tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        init_model([*given, "--seed", seed, "--out", str(tmp_path / name)])
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_nothing_is_overwritten_unasked(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*given, "--seed", "3", "--out", str(tmp_path / "m")]
    init_model(arguments)
    before = (tmp_path / "m/model.safetensors").read_bytes()
    again = [*given, "--seed", "4", "--out", str(tmp_path / "m")]
    with pytest.raises(SystemExit) as caught:
        cli.run(init_model, again)
    assert caught.value.code == 2
    assert "pass --fresh to replace it" in capsys.readouterr().err
    assert (tmp_path / "m/model.safetensors").read_bytes() == before
    init_model([*again, "--fresh"])
    assert (tmp_path / "m/model.safetensors").read_bytes() != before

    (tmp_path / "m/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"m: has notes\.txt, which this command does not write"):
        init_model([*again, "--fresh"])

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        init_model([*given, "--seed", "3", "--out", str(tmp_path / "mine"), "--fresh"])


def test_a_vocabulary_that_is_too_small_is_refused(given: list[str], tmp_path: Path) -> None:
    values = json.loads(Path(given[1]).read_text())
    (tmp_path / "small.json").write_text(json.dumps({**values, "vocab_size": 64}))
    with pytest.raises(ValueError, match="vocab_size 64 is smaller"):
        init_model(["--config", str(tmp_path / "small.json"), *given[2:], "--seed", "3", "--out", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()


def test_the_block_size_is_the_flags_or_the_configs(given: list[str], tmp_path: Path) -> None:
    for name, flags, block in (("own", [], 4), ("given", ["--block-size", "8"], 8)):
        init_model([*given, "--seed", "3", "--out", str(tmp_path / name), *flags])
        assert load_model(tmp_path / name).config.block_size == block
