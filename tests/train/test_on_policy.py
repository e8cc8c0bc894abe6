"""Responses that the student wrote are compared with the teacher, and not learned by heart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.data.sources import open_mixture
from megatron_tide.diffusion import build_inputs, noise
from megatron_tide.diffusion.masking import SYNCHRONOUS
from megatron_tide.hosting.cached import OutputCache, cache_settings
from megatron_tide.train.inputs import RunInputs, read_run_inputs
from tests.hosting.backends import teacher_folder
from tests.support.chain import PREPARING, Chain
from tests.support.commands import command
from tests.support.models import tiny_student_config, tiny_wedlm_config
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


@pytest.fixture(scope="module")
def written(chain: Chain, prepared: Path) -> Path:
    """Eight rows of the student's, with tokens of one byte each, of which the second half does not spell the text."""
    tokenizer = load_tokenizer(chain.root / "student")
    byte = {tokenizer.id_to_bytes(token): token for token in range(tokenizer.vocab_size)}
    rows = []
    for number, line in enumerate((prepared / "0.jsonl").read_text().splitlines()):
        row = json.loads(line)
        ids = [byte[bytes([one])] for one in row["messages"][-1]["content"].encode()]
        order = [1 + (3 * place) % len(ids) for place in range(len(ids) + 1)]
        ids[-1] += number >= ROWS // 4
        rows.append({**row, "written": {"ids": [*ids, tokenizer.eos_id], "order": order}})
    (prepared / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": "written.jsonl", "own": True, "written_column": "written"}, {"path": "1.jsonl"}]
    (prepared / "written.json").write_text(json.dumps({"sources": sources}))
    flags = ["--data", str(prepared / "written.json"), "--bridge", str(chain.root / "bridge"), *PREPARING]
    for side in ("student", "teacher"):
        flags += [f"--{side}", str(chain.root / side), f"--{side}-length", "160", f"--{side}-block", "8"]
    command("prepare")([*flags, "--out", str(prepared / "written")])
    return prepared / "written"


def test_tokens_are_those_that_the_student_wrote(written: Path, prepared: Path) -> None:
    data, plain = PreparedData.open(written), PreparedData.open(prepared / "none")
    assert (data.ordered, plain.ordered, plain.sample(0).student.order) == (True, False, None)
    rows = [json.loads(line)["written"] for line in (prepared / "written.jsonl").read_text().splitlines()]
    taken = 0
    for index in range(len(data)):
        sample = data.sample(index)
        side, row, order = sample.student, rows[sample.key] if sample.key < len(rows) else None, sample.student.order
        assert order is not None
        assert len(order) == len(side.ids)
        if row is None or sample.key >= ROWS // 4:  # other text, and tokens that do not spell the text: encoded anew
            assert not order.any()
            assert np.array_equal(
                side.ids[: side.content_end], plain.sample(sample.key).student.ids[: side.content_end]
            )
            continue
        taken += 1
        count, end = len(row["ids"]), row["order"][-1]
        assert side.ids[side.prompt :][:count].tolist() == row["ids"], "with its end of text"
        assert order.tolist() == [0] * side.prompt + row["order"] + [end] * (len(order) - side.prompt - count)
        assert sample.teacher is not None
        other = plain.sample(sample.key).teacher
        assert other is not None
        assert sample.teacher.ids.tolist() == other.ids.tolist()
    assert taken == ROWS // 4
    batch = read_batch(data, [0, len(data) - 1])
    assert batch.order is not None
    assert (batch.order > 0).any(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"ids": [1, 2], "order": [1]}, "written has ids and an order of different lengths"),
        ({"ids": [-1], "order": [1]}, "-1, where a whole number from 0"),
        ({"ids": [1], "order": [0]}, "0, where a whole number from 1"),
        ("ab", "str, where"),
    ],
)
def test_a_row_that_says_nothing_of_the_kind_is_named(tmp_path: Path, row: object, said: str) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": talk, "written": row}) + "\n")
    for own in (True, False):
        source = {"path": "own.jsonl", "own": own, "written_column": "written"}
        (tmp_path / f"{own}.json").write_text(json.dumps({"sources": [source]}))
    found = open_mixture([str(tmp_path / "True.json")]).error(0)
    assert found.startswith(f"{tmp_path / 'own.jsonl'}:1")
    assert said in found
    with pytest.raises(ValueError, match='add "own": true'):
        open_mixture([str(tmp_path / "False.json")])


def test_masks_in_the_order_of_the_students_text(chain: Chain, prepared: Path, written: Path, tmp_path: Path) -> None:
    """What is asked for must be there; then own text alone has other masks, and a cache is for one of them."""

    def inputs(data: Path, **flags: object) -> RunInputs:
        return read_run_inputs(from_flat(chain.run(tmp_path / "run", data=str(data), **flags)), 1)

    order = {"own_masks": "order", "timesteps": "block"}
    with pytest.raises(
        ValueError, match=r"none does not say in which order the student wrote; .* rollout --as-written"
    ):
        inputs(prepared / "none", **order)
    with pytest.raises(ValueError, match="--own-masks order is a state of each block: add --timesteps block"):
        inputs(written, own_masks="order")
    found, plain = inputs(written, **order), inputs(written, timesteps="block")
    assert found.strategy.describe()["own_masks"] == "order"
    assert "own_masks" not in plain.strategy.describe()
    batch = read_batch(found.data, [0, len(found.data) - 1])
    masks = [
        noise(batch, seed=1, epoch=0, masking=SYNCHRONOUS, sampling=one.strategy.noise_sampling, block=8).student_masked
        for one in (found, plain)
    ]
    assert [torch.equal(*rows) for rows in zip(*masks)] == [False, True]
    asked = [cache_settings(from_flat({}), one.strategy, "data", "bridge", 4) for one in (found, plain)]
    assert [one["own_masks"] for one in asked] == ["random", "random"], "of the run's flags"
    theirs = OutputCache(tmp_path, {"settings": {**asked[0], "own_masks": "order"}})
    with pytest.raises(ValueError, match="asked with own_masks = order, this run has random"):
        theirs.refuse_other(asked[1], 0, 0, 4)


def test_a_phase_with_nothing_to_learn_is_refused(
    chain: Chain, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inputs(**flags: object) -> RunInputs:
        return read_run_inputs(from_flat(chain.run(tmp_path / "run", data=str(prepared / "first"), **flags)), 1)

    plain = ({"strategy": "bd3lm"}, {"pretraining": "joint:0.5"})
    for flags in plain:
        assert inputs(**flags).phases.phases
    monkeypatch.setattr(PreparedData, "own", lambda self, keys: np.ones(len(keys), bool))
    assert inputs().phases.phases
    for flags, name in zip(plain, ("bd3lm", "joint")):
        with pytest.raises(ValueError, match=f"the student wrote every response, and strategy {name} asks no teacher"):
            inputs(**flags)


@pytest.fixture(scope="module")
def teachers(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The flags of a run with each kind of teacher; all have the tokenizer of the chain's, an LLaDA2."""
    root = tmp_path_factory.mktemp("teachers")
    configs = {"wedlm": tiny_wedlm_config(), "qwen3": tiny_student_config(model_type="qwen3")}
    folders = {name: teacher_folder(chain.root / "teacher", root / name, config) for name, config in configs.items()}
    flags = {name: {"teacher": str(folder)} for name, folder in folders.items()}
    flags["qwen3"]["teacher_context"] = "causal"
    return {"llada2": {}, **flags}


def in_turn(*runs):  # type: ignore[no-untyped-def]
    for flags in runs:
        train_and_tell(flags)


def test_denoising_leaves_it_out_and_the_teacher_does_not(
    chain: Chain, prepared: Path, written: Path, teachers: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """What denoising loses on one half it has on the other: the sums over halves are those of all rows.

    With every kind of teacher; and read from a cache of it, also of own text as it was written, in its own order.
    """
    settings = {"global_batch_size": ROWS, "micro_batch_size": 8, "max_steps": 1, "strategy": "tide-bridge"}
    runs = []
    for teacher, flags in teachers.items():
        root = tmp_path / teacher
        flags = {**settings, **flags}
        runs += [chain.run(root / name, data=str(prepared / name), **flags) for name in OWN]
        flags |= {"data": str(written), "own_masks": "order", "timesteps": "block", "global_batch_size": ROWS // 2}
        command("cache")(chain.flags(root / "answers", **flags))
        cached = {**flags, "teacher_hosting": "cached", "teacher_cache": str(root / "answers"), "teacher": ""}
        runs += [chain.run(root / "live", **flags), chain.run(root / "cached", **cached)]
    run_on_ranks(in_turn, 1, *runs, timeout=280)
    distilled = []
    for teacher in teachers:
        root = tmp_path / teacher
        none, first, second = (read_curve(root / name) for name in OWN)
        assert first["loss/distill"] == second["loss/distill"] == none["loss/distill"]
        assert first["loss/denoise"][0] > 0.1
        assert second["loss/denoise"][0] > 0.1
        assert first["loss/denoise"][0] + second["loss/denoise"][0] == pytest.approx(none["loss/denoise"][0], rel=1e-6)
        live, cached = (read_curve(root / name) for name in ("live", "cached"))
        for loss in ("loss/distill", "loss/denoise", "loss/total"):
            assert cached[loss] == live[loss]
        distilled += [none["loss/distill"][0], live["loss/distill"][0]]
    assert len(set(distilled)) == 2 * len(teachers)
    assert min(distilled) > 0.0
