"""A round of on-policy data: its rows and shares are drawn exactly, and its texts do not depend on who wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.data.sources import open_mixture
from megatron_tide.generate import complete
from megatron_tide.generate.rollouts import Rollouts, Round, draw_round
from megatron_tide.models import load_model
from megatron_tide.ranks import on_main
from tests.support.answering import write_autoregressive
from tests.support.chain import Chain
from tests.support.commands import command

LENGTH = 64


def drawn(chain: Chain, **changes: Any) -> Round:
    settings = {"number": 1, "seed": 3, "samples": 12, "share": 0.25, "longest": LENGTH - 8} | changes
    return draw_round(
        open_mixture([str(chain.root / "corpus.jsonl")]), load_tokenizer(chain.root / "student"), **settings
    )


def asked(found: Round) -> list[str]:
    return [talk[-1]["content"] for talk in found.asked]


def test_rows_and_shares_are_exact_and_drawn_by_seed_and_round(chain: Chain) -> None:
    first = drawn(chain)
    assert (len(first.asked), len(first.prompts), len(first.seeds), len(first.kept)) == (3, 3, 3, 9)
    assert [(len(one.asked), len(one.kept)) for one in (drawn(chain, share=0.0), drawn(chain, share=1.0))] == [
        (0, 12), (12, 0)
    ]  # fmt: skip
    every = drawn(chain, share=1.0)
    assert asked(every)[:3] == asked(first), "the same rows, whatever their share"
    assert asked(every)[3:] == [talk[0]["content"] for talk in first.kept]
    assert every.seeds[:3] == first.seeds
    assert len(set(every.seeds)) == 12
    assert all(talk[-1]["role"] == "user" for talk in every.asked)
    for other in (drawn(chain, number=2, share=1.0), drawn(chain, seed=4, share=1.0)):
        assert asked(other) != asked(every)
        assert not set(other.seeds) & set(every.seeds)
    with pytest.raises(ValueError, match="--samples 49: the data have 48 rows"):
        drawn(chain, samples=49)
    with pytest.raises(ValueError, match="the data have 0 rows with a prompt that fits"):
        drawn(chain, longest=2)


def test_rows_of_a_mixture_are_those_that_prepare_takes(chain: Chain, tmp_path: Path) -> None:
    def of(**source: Any) -> Round:
        source |= {"path": str(chain.root / "corpus.jsonl")}
        (tmp_path / "mixture.json").write_text(json.dumps({"sources": [source]}))
        mixture, tokenizer = open_mixture([str(tmp_path / "mixture.json")]), load_tokenizer(chain.root / "student")
        return draw_round(mixture, tokenizer, number=1, seed=3, samples=48, share=1.0, longest=LENGTH - 8)

    assert len(of().asked) == 48
    with pytest.raises(ValueError, match="the data have 0 rows"):
        of(max_chars=1)
    with pytest.raises(ValueError, match=r"the student wrote its responses; draw a round from the corpus itself"):
        of(own=True)


def test_rows_that_are_passed_over_are_counted_and_changed_text_is_told(chain: Chain, tmp_path: Path) -> None:
    folder = shutil.copytree(chain.root / "student", tmp_path / "student")
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": {"type": "Lowercase"}}))
    ask, say = {"role": "user", "content": "add Two"}, {"role": "assistant", "content": "x"}
    odd = [ask, {**ask, "name": "Bob"}, say], [ask], [{**ask, "content": "word " * 100}, say]
    lines = [json.dumps({"messages": messages}) for messages in ([ask, say], *odd)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{", ""]))
    source = {"path": "rows.jsonl", "max_chars": 1000}
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": [source]}))
    mixture, tokenizer = open_mixture([str(tmp_path / "mixture.json")]), load_tokenizer(folder)
    how: dict[str, Any] = {"number": 1, "seed": 3, "share": 1.0, "longest": 40}
    said = "1 a message that .*, 1 a prompt that leaves no room for an answer, 1 cannot be read, 1 no assistant turn"
    with pytest.raises(ValueError, match=rf"the data have 1 rows .*passed over: {said}\); use fewer"):
        draw_round(mixture, tokenizer, samples=2, **how)
    seeds = (draw_round(mixture, tokenizer, samples=1, **how | {"seed": seed}) for seed in range(20))
    found = next(one for one in seeds if one.passed)
    assert found.prompts[0].changed == "'Two' is read as 'two'"


class Ranks:
    """Several ranks, one after the other in one process, each with what the ranks before it have written."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.is_main, self.device = rank, size, True, torch.device("cpu")

    def on_main(self, work: Any) -> Any:
        return on_main(self, work)

    def broadcast_object(self, value: Any) -> Any:
        return value

    def sum_over_ranks(self, numbers: list[float]) -> list[float]:
        return numbers

    def gather_on_all(self, value: Any) -> list[Any]:
        return [value]

    def print_rank0(self, line: str) -> None:
        pass


@pytest.fixture(scope="module")
def model(chain: Chain) -> Any:
    return load_model(chain.root / "student")


def rollouts(chain: Chain, folder: Path, **changes: Any) -> Rollouts:
    folder.mkdir(exist_ok=True)
    tokenizer, found = load_tokenizer(chain.root / "student"), drawn(chain, share=0.75)
    options = {"temperature": 1.0, "block_size": 8}
    settings = {"length": LENGTH, "batch_size": 2, "decides": "model", "options": options} | changes
    return Rollouts(folder=folder, tokenizer=tokenizer, round=found, **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "rollouts.json"}


def test_any_number_of_ranks_and_interruptions_write_the_same_files(chain: Chain, model: Any, tmp_path: Path) -> None:
    alone = rollouts(chain, tmp_path / "alone")
    assert alone.answer(model, Ranks(0, 1), lambda: False)
    made = files(alone.folder)
    assert set(made) == {"answers.jsonl", "own.jsonl", "corpus.jsonl", "mixture.json"}
    for size, batch in ((2, 2), (3, 4)):
        shared = rollouts(chain, tmp_path / str(size), batch_size=batch)
        turn = 0
        while not shared.answer(model, Ranks(turn % size, size), lambda: False):
            turn += 1
        assert turn > 0, "each does its own share only"
        assert files(shared.folder) == made
    stopped, calls = rollouts(chain, tmp_path / "stopped"), iter([False, False, True])
    assert not stopped.answer(model, Ranks(0, 1), lambda: next(calls))
    rows = (stopped.folder / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) == 4
    (stopped.folder / "answers-1.jsonl").write_text(rows.pop()[:20])  # half a line of a rank that was killed
    (stopped.folder / "answers.jsonl").write_text("".join(rows))
    assert stopped.answer(model, Ranks(0, 1), lambda: False)
    assert files(stopped.folder) == made
    with pytest.raises(ValueError, match="an answer of another model, prompt or setting"):
        rollouts(chain, stopped.folder, decides="another").answer(model, Ranks(0, 1), lambda: False)


def test_files_of_the_user_are_not_replaced(chain: Chain, model: Any, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"has a corpus\.jsonl that is not of a round"):
        rollouts(chain, tmp_path).answer(model, Ranks(0, 1), lambda: False)
    assert files(tmp_path) == {"corpus.jsonl": b"mine"}


def test_answers_are_those_of_the_decoder_up_to_the_length(chain: Chain, model: Any, tmp_path: Path) -> None:
    made = rollouts(chain, tmp_path / "run", batch_size=5)
    assert made.answer(model, Ranks(0, 1), lambda: False)
    rows = [json.loads(line) for line in (made.folder / "answers.jsonl").read_text().splitlines()]
    for row, prompt, seed in zip(rows, made.round.prompts, made.round.seeds):
        room = LENGTH - len(prompt.ids)
        options: dict[str, Any] = {"max_new_tokens": room, "seed": seed, **made.options}
        (expected,) = complete(model, made.tokenizer, [prompt.ids], **options)
        assert (row["answer"], row["tokens"], row["finished"]) == (
            expected.text, len(expected.ids), expected.finished
        )  # fmt: skip
        assert row["finished"] or row["tokens"] == room
    talks = [json.loads(line)["messages"] for line in (made.folder / "own.jsonl").read_text().splitlines()]
    assert [talk[-1] for talk in talks] == [{"role": "assistant", "content": row["answer"]} for row in rows]
    assert [talk[:-1] for talk in talks] == made.round.asked
    kept = [json.loads(line)["messages"] for line in (made.folder / "corpus.jsonl").read_text().splitlines()]
    assert kept == made.round.kept
    summary = json.loads((made.folder / "rollouts.json").read_text())
    assert summary["passed"] == made.round.passed == {}
    assert (summary["own"], summary["corpus"], summary["tokens"]) == (9, 3, sum(row["tokens"] for row in rows))


def test_answers_as_written(chain: Chain, model: Any, tmp_path: Path) -> None:
    """Tokens and passes stand beside the texts, which are those of before; an answer of other settings is refused."""
    plain = rollouts(chain, tmp_path / "plain")
    made = rollouts(chain, tmp_path / "made", as_written=True)
    for one in (plain, made):
        assert one.answer(model, Ranks(0, 1), lambda: False)
    told, written = (
        [json.loads(line) for line in (one.folder / "own.jsonl").read_text().splitlines()] for one in (plain, made)
    )
    assert [row["messages"] for row in written] == [row["messages"] for row in told]
    assert [list(row) for row in told] == [["messages"]] * 9
    for row, prompt, seed in zip(written, made.round.prompts, made.round.seeds):
        options: dict[str, Any] = {"max_new_tokens": LENGTH - len(prompt.ids), "seed": seed, **made.options}
        (expected,) = complete(model, made.tokenizer, [prompt.ids], **options)
        assert row["written"] == {"ids": expected.ids, "order": expected.order}
        assert len(set(expected.order)) == len(expected.ids), "one token a pass"
    sources = json.loads((made.folder / "mixture.json").read_text())["sources"]
    assert sources == [
        {"path": "own.jsonl", "own": True, "written_column": "written"}, {"path": "corpus.jsonl", "own": False}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="an answer of another model, prompt or setting"):
        rollouts(chain, made.folder).answer(model, Ranks(0, 1), lambda: False)


def test_the_command_counts_first_and_refuses_in_one_line(chain: Chain, tmp_path: Path, capsys: Any) -> None:
    flags = [str(chain.root / "student"), "--data", str(chain.root / "corpus.jsonl"), "--student-length", "64"]
    flags += ["--out", str(tmp_path / "out"), "--dry-run"]
    assert command("rollout")([*flags, "--samples", "9", "--share", "0.5"]) == 0
    assert "dry run: 9 of 48 rows, 4 of them to be answered: OK" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--samples 50: the data have 48 rows"):
        command("rollout")([*flags, "--samples", "50"])
    baseline = str(write_autoregressive(tmp_path / "ar", chain.root / "student"))
    with pytest.raises(ValueError, match="ar: an autoregressive model; make a student of it with init-model"):
        command("rollout")([baseline, *flags[1:-1], "--samples", "9"])
    assert not (tmp_path / "out").exists()
