"""Block decoding over llama.cpp: our own tokens, a cache that is exact, and the commands.

Everything runs over ``tests.support.fake_llama``, and over llama-cpp-python too where it is installed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.generate import complete, open_writer, stream
from megatron_tide.models import load_model
from megatron_tide.models.decoding_a2d import BlockCache
from megatron_tide.models.gguf_model import GgufModel
from megatron_tide.training_checkpoint import open_model
from tests.support.commands import command
from tests.support.fake_llama import fake_llama_cpp
from tests.support.gguf_models import gguf_release

pytest.importorskip("gguf", reason="NOT TESTED: gguf is not installed (requirements-gguf.txt)")
BLOCK = 4
ROLLOUT = "{} --data x.jsonl --out x --samples 1 --student-length 9"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_release(tmp_path_factory.mktemp("release"), block_size=BLOCK)


@pytest.fixture(scope="module")
def file(release: Path) -> Path:
    command("convert-gguf")([str(release), str(release / "f32.gguf"), "--type", "f32"])
    return release / "f32.gguf"


@pytest.fixture(scope="module", params=["fake", "llama.cpp"])
def model(request: pytest.FixtureRequest, file: Path) -> Iterator[GgufModel]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fake":
            patch.setitem(sys.modules, "llama_cpp", fake_llama_cpp())
        elif importlib.util.find_spec("llama_cpp") is None:
            pytest.skip("NOT TESTED: llama-cpp-python is not installed (requirements-gguf.txt)")
        yield GgufModel(file)


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> TextTokenizer:
    return load_tokenizer(file)


def test_without_llama_cpp_one_line_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"f32.gguf: needs llama-cpp-python; pip install -r requirements-gguf.txt"):
        GgufModel(file)


def test_other_commands_name_the_release(file: Path) -> None:
    with pytest.raises(ValueError, match=r"f32.gguf: a GGUF file, which only generate reads; give the release"):
        open_model(file)
    for name, words in (("evaluate", "{} --tasks humaneval"), ("evaluate", "--student {}"), ("rollout", ROLLOUT)):
        with pytest.raises(ValueError, match=r"f32.gguf: a GGUF file, which only generate reads; give the release"):
            command(name)(words.format(file).split())
    with pytest.raises(ValueError, match=r"nowhere.gguf: no such file"):
        command("generate")([str(file.with_name("nowhere.gguf")), "--prompt", "x"])


def prompts_of(tokenizer: TextTokenizer, *lengths: int) -> list[np.ndarray]:
    ids = tokenizer.encode("def add(left, right):\n    return left + right\n" * 20)
    return [ids[:length] for length in lengths]


@pytest.mark.parametrize("layout", ["sequence", "answer"])
@pytest.mark.parametrize("how", [{}, {"threshold": 0.01}, {"tokens_per_step": 2, "temperature": 1.0}])
def test_the_tokens_are_those_of_the_release(
    release: Path, model: GgufModel, tokenizer: TextTokenizer, layout: str, how: dict[str, float]
) -> None:
    prompts, settings = prompts_of(tokenizer, 1, 3, 4, 5, 21), {"max_new_tokens": 11, "block_layout": layout, **how}
    ours = complete(model, tokenizer, prompts, min_new_tokens=11, **settings)
    theirs = complete(load_model(release), tokenizer, prompts, min_new_tokens=11, batch_size=1, **settings)
    assert [answer.ids for answer in ours] == [answer.ids for answer in theirs]
    assert [answer.passes for answer in ours] == [answer.passes for answer in theirs]


def test_blocks_begin_where_the_release_states_it(release: Path, tmp_path: Path, monkeypatch) -> None:
    """As model.generate does, whichever file of the folder says so; a flag comes before it."""
    monkeypatch.setitem(sys.modules, "llama_cpp", fake_llama_cpp())
    folder, found = shutil.copytree(release, tmp_path / "stating"), []
    (folder / "generation_config.json").write_text('{"block_layout": "answer"}')
    command("convert-gguf")([str(folder), str(tmp_path / "stating.gguf"), "--type", "f32"])
    for model in (folder, tmp_path / "stating.gguf", release):
        for flag in ([], ["--block-layout", "answer"], ["--block-layout", "sequence"]):
            out = tmp_path / f"{len(found)}.jsonl"
            command("generate")([str(model), "--prompt", "abc", "--max-new-tokens", "9", "--json", str(out), *flag])
            found.append(json.loads(out.read_text())["answer"])
    answer, sequence = found[1], found[2]
    assert found == [answer, answer, sequence] * 2 + [sequence, answer, sequence]
    assert answer != sequence


def test_holes_are_filled_and_a_stream_is_the_same_text(
    release: Path, model: GgufModel, tokenizer: TextTokenizer
) -> None:
    (prompt,) = prompts_of(tokenizer, 14)
    prompt[[5, 6, 11]] = tokenizer.mask_id
    ours, theirs = (complete(one, tokenizer, [prompt], max_new_tokens=9)[0] for one in (model, load_model(release)))
    assert (ours.prompt, ours.ids) == (theirs.prompt, theirs.ids)
    assert "".join(moment.new_text for moment in stream(model, tokenizer, prompt, max_new_tokens=9)) == ours.text


def rows(model: GgufModel, ids: torch.Tensor, cache: BlockCache) -> torch.Tensor:
    """Logits of the masks of a pass: its blocks follow one another."""
    begin, end = cache.length, cache.length + len(ids)
    queries, keys = torch.arange(begin, end), torch.arange(end)
    mask = (queries.unsqueeze(1) // BLOCK >= keys // BLOCK)[None, None]
    numbers = model.backbone(ids[None], mask, queries[None], cache)
    return model.head(numbers[0][ids == model.config.mask_token_id])


def test_a_block_sees_itself_and_what_is_before_it(release: Path, model: GgufModel) -> None:
    mask = model.config.mask_token_id
    ids = torch.arange(10, 22)
    ids[[8, 9]] = mask
    reference = load_model(release)
    keys = torch.arange(12)
    seen = (keys.unsqueeze(1) // BLOCK >= keys // BLOCK)[None, None]
    found = rows(model, ids, BlockCache(12))
    expected = reference(ids[None], seen).logits[0, [8, 9]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ids[11] = 40  # the last token of the block
    moved = rows(model, ids, BlockCache(12))
    assert (moved[0] - found[0]).abs().max() > 1e-2
    torch.testing.assert_close(moved, reference(ids[None], seen).logits[0, [8, 9]], rtol=1e-4, atol=1e-4)


def test_the_block_cache_is_exact(model: GgufModel) -> None:
    mask = model.config.mask_token_id
    ids = torch.arange(10, 26)
    tried, cache = ids.clone(), BlockCache(16)
    tried[[4, 5, 6]] = mask
    first = rows(model, tried[:8], cache)  # a block under way, with other tokens than in the end
    cache.commit(BLOCK)
    assert torch.equal(rows(model, tried[4:8], cache), first)  # a pass again, bit for bit
    rows(model, ids[4:8], cache)
    ids[[12, 14]] = mask
    late = rows(model, ids[4:16], cache)
    cache.commit(8)
    assert torch.equal(rows(model, ids[12:16], cache), late)
    assert torch.equal(rows(model, ids, BlockCache(16)), late)  # all blocks at once


def test_commands(release: Path, file: Path, model: GgufModel, tmp_path: Path, capsys, monkeypatch) -> None:
    generate, prompts, answers = command("generate"), tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello", "add two", "x")))
    printed = []
    for place in (release, file):
        generate([str(place), "--file", str(prompts), "--max-new-tokens", "9", "--batch-size", "1"])
        printed.append(capsys.readouterr().out.rpartition("\n\n")[0])
    assert printed[0] == printed[1]
    flags = [str(file), "--file", str(prompts), "--max-new-tokens", "9", "--json", str(answers)]
    generate([*flags, "--limit", "2"])
    assert len(answers.read_text().splitlines()) == 2
    generate(flags)
    assert "2 of 3 answers are there from before" in capsys.readouterr().out
    assert len(answers.read_text().splitlines()) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nand <|im_end|>?\n"))
    generate([str(file), "--chat", "--max-new-tokens", "9", "--block-layout", "answer"])
    assert "tokens/s" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
def test_smaller_types_write_too(release: Path, model: GgufModel, tmp_path: Path, kind: str) -> None:
    command("convert-gguf")([str(release), str(tmp_path / "small.gguf"), "--type", kind])
    writer, small, tokenizer = open_writer(str(tmp_path / "small.gguf"), torch.float32, "cpu")
    (prompt,) = prompts_of(tokenizer, 10)
    (found,) = writer.answers(small, tokenizer, [prompt], max_new_tokens=6, min_new_tokens=6)
    assert len(found[0].ids) == 6
    ids = torch.arange(10, 18)
    ids[6] = model.config.mask_token_id
    exact, near = (rows(one, ids, BlockCache(8)) for one in (model, small))
    assert 0 < (near - exact).abs().max() < exact.abs().max()


def test_llama_cpp_makes_the_same_tokens_of_text(file: Path, model: GgufModel, tokenizer: TextTokenizer) -> None:
    llama_cpp = model.llama._cpp
    if not hasattr(llama_cpp, "llama_tokenize"):
        pytest.skip("NOT TESTED: llama-cpp-python is not installed (requirements-gguf.txt)")
    how = llama_cpp.llama_model_default_params()
    how.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(str(file).encode(), how)
    words = llama_cpp.llama_model_get_vocab(loaded)
    texts = ["def add(a, b):\n    return a + b  # 1234, don't\n\n\tx", "naïve 世界 \r\n  ...", "a <|im_end|> b"]
    try:
        for text in texts:
            data, room = text.encode(), (llama_cpp.llama_token * 200)()
            count = llama_cpp.llama_tokenize(words, data, len(data), room, 200, False, False)
            assert room[:count] == tokenizer.encode(text).tolist(), text
    finally:
        llama_cpp.llama_model_free(loaded)
