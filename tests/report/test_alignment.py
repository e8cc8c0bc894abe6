"""The blocks of the alignment spell the texts on both sides."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.report.alignment import align, aligned_samples
from megatron_tide.report.run_folder import TrainingRun, read_run


def spelled(tokens):
    return "".join(shown for shown, _ in tokens)


@pytest.fixture(scope="module")
def tokenizers(chain):
    return tuple(load_tokenizer(chain.root / side) for side in ("student", "teacher"))


@pytest.mark.slow  # a recipe's folder is made first
def test_blocks_of_a_run_spell_its_responses(recipe):
    texts = aligned_samples(read_run(recipe, "tiny").trainings[1], recipe)
    assert len(texts) >= 2
    for blocks in texts:
        assert spelled(token for block in blocks for token in block[0]).startswith("def·")
        for student, teacher in blocks:
            assert spelled(student) == spelled(teacher)
            kinds = {kind for _, kind in (*student, *teacher)}
            if any(kind.startswith("one") for kind in kinds):
                assert (len(student), len(teacher), len(kinds)) == (1, 1, 1)
            else:
                assert all(kind.startswith("several") for kind in kinds)


def recorded(folder, **paths):
    return TrainingRun(folder=folder, label="run", metrics=pd.DataFrame(), paths=paths)


def test_recorded_paths_are_not_shown(tmp_path):
    paths = {"bridge": "/home/alice/a private/bridge", "teacher": "/home/alice/teacher", "student": "x", "data": ""}
    with pytest.raises(ValueError, match=r"^bridge: no bridge here") as error:
        aligned_samples(recorded(tmp_path, **paths), tmp_path)
    assert "alice" not in str(error.value)


def test_nothing_is_downloaded(chain, tmp_path, monkeypatch):
    asked = []

    def cached_only(name, **how):
        asked.append((name, how["local_files_only"]))
        raise FileNotFoundError("no snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached_only)
    paths = dict.fromkeys(("student", "teacher"), "evil/model")
    paths |= {name: str(chain.root / name) for name in ("bridge", "data")}
    with pytest.raises(ValueError, match="evil/model: not on this machine"):
        aligned_samples(recorded(tmp_path, **paths), tmp_path)
    assert asked == [("evil/model", True)]


def test_blocks_end_where_tokens_of_both_sides_end(tokenizers):
    text = "def line(value, right, index):\n    return value + right"
    (blocks,) = align(*tokenizers, [text], same=False)
    ends = [set(), set()]
    for side, tokenizer in enumerate(tokenizers):
        done = 0
        for piece in tokenizer.token_bytes(tokenizer.encode(text)):
            done += len(piece)
            ends[side].add(done)
    assert len(blocks) == len(ends[0] & ends[1])
    first = [block[0][0][1][-1] for block in blocks]
    assert all(one != other for one, other in pairwise(first))  # neighbouring chunks differ


def test_a_control_character_is_shown_and_every_token_has_a_kind(tokenizers):
    (blocks,) = align(*tokenizers, ["a \U00012345 \x1b[31m b"], same=False)
    kinds = {"one0", "one1", "several0", "several1", "none"}
    assert {kind for block in blocks for side in block for _, kind in side} <= kinds
    for side in (0, 1):
        shown = "".join(spelled(block[side]) for block in blocks)
        assert "\x1b" not in shown
        assert "\\x1b" in shown
