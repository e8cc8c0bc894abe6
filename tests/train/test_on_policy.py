"""Responses that the student wrote are compared with the teacher, and not learned by heart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.data.sources import open_mixture
from megatron_tide.diffusion import build_inputs, noise
from megatron_tide.diffusion.masking import SYNCHRONOUS
from tests.support.chain import PREPARING, Chain
from tests.support.commands import command
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve, train_and_tell

ROWS = 16
OWN = {"none": (False, False), "first": (True, False), "second": (False, True)}


@pytest.fixture(scope="module")
def prepared(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows three times, of which the student wrote none, the first half, and the second half."""
    root = tmp_path_factory.mktemp("own")
    lines = (chain.root / "corpus.jsonl").read_text().splitlines(keepends=True)
    for number, part in enumerate((lines[: ROWS // 2], lines[ROWS // 2 : ROWS])):
        (root / f"{number}.jsonl").write_text("".join(part))
    for name, own in OWN.items():
        sources = [{"path": f"{number}.jsonl", "own": is_own} for number, is_own in enumerate(own)]
        (root / f"{name}.json").write_text(json.dumps({"sources": sources}))
        flags = ["--data", str(root / f"{name}.json"), "--bridge", str(chain.root / "bridge"), *PREPARING]
        for side in ("student", "teacher"):
            flags += [f"--{side}", str(chain.root / side), f"--{side}-length", "96", f"--{side}-block", "8"]
        command("prepare")([*flags, "--out", str(root / name)])
    return root


def test_the_data_say_which_responses_are_the_students(prepared: Path) -> None:
    opened = {name: PreparedData.open(prepared / name) for name in OWN}
    assert "own" not in opened["none"].manifest
    keys = np.arange(ROWS)
    assert opened["none"].own(keys) is None
    for name, expected in (("first", keys < ROWS // 2), ("second", keys >= ROWS // 2)):
        assert opened[name].own(keys).tolist() == expected.tolist()
    assert len({data.fingerprint for data in opened.values()}) == 3
    assert open_mixture([str(prepared / "first.json")]).own == [[0, ROWS // 2 - 1]]
    (prepared / "bad.json").write_text(json.dumps({"sources": [{"path": "0.jsonl", "own": 1}]}))
    with pytest.raises(ValueError, match=r"bad.json: sources\[0\]: own cannot be 1"):
        open_mixture([str(prepared / "bad.json")])


def test_masked_tokens_of_the_students_text_are_no_gold(prepared: Path) -> None:
    def inputs(name: str):  # type: ignore[no-untyped-def]
        batch = read_batch(PreparedData.open(prepared / name), [1, 12, 3, 9])
        drawn = noise(batch, seed=1, epoch=0, masking=SYNCHRONOUS)
        return batch, build_inputs(batch, drawn, student_block=8, student_mask_id=0, teacher=None), drawn

    _, plain, _ = inputs("none")
    assert plain.gold is None
    _, half, drawn = inputs("first")
    sample_M = drawn.student_masked.nonzero()[:, 0]
    assert half.gold.tolist() == [row for row, sample in enumerate(sample_M.tolist()) if sample in (1, 3)]
    assert torch.equal(half.student_targets, plain.student_targets)
    assert half.maskable == plain.maskable


def in_turn(*runs):  # type: ignore[no-untyped-def]
    for flags in runs:
        train_and_tell(flags)


def test_denoising_leaves_it_out_and_the_teacher_does_not(chain: Chain, prepared: Path, tmp_path: Path) -> None:
    """What denoising loses on one half it has on the other: the sums over halves are those of all rows."""
    settings = {"global_batch_size": ROWS, "micro_batch_size": 8, "max_steps": 1, "strategy": "tide-bridge"}
    runs = [chain.run(tmp_path / name, data=str(prepared / name), **settings) for name in OWN]
    run_on_ranks(in_turn, 1, *runs, timeout=280)
    none, first, second = (read_curve(tmp_path / name) for name in OWN)
    assert first["loss/distill"] == second["loss/distill"] == none["loss/distill"]
    assert first["loss/denoise"][0] > 0.1
    assert second["loss/denoise"][0] > 0.1
    assert first["loss/denoise"][0] + second["loss/denoise"][0] == pytest.approx(none["loss/denoise"][0], rel=1e-6)
