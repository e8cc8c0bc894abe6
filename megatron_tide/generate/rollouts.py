"""A round of on-policy data: prompts of a corpus, some of which the student answers itself.

    corpus -> rows drawn by (seed, round) -> a share of them answered -> own.jsonl, corpus.jsonl, mixture.json

``prepare --data mixture.json`` makes the training data of the round, in which the student's own text is only compared
with the teacher (``SourceSpec.own``): it is nothing to learn by heart. Which rows, which of them are answered, and what
an answer draws its random numbers from are functions of (seed, round, row), and batches do not depend on the ranks that
share them: any number of ranks writes the same files, also after an interruption.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tide.bridge import LeftOut, TemplateLimit, TextTokenizer
from megatron_tide.bridge.changes import first_change
from megatron_tide.data.build import TOO_LONG, UNREADABLE
from megatron_tide.data.encode import NOT_WRITTEN, REFUSED, split_response
from megatron_tide.data.sampler import permutation
from megatron_tide.data.sources import WRITTEN, Mixture
from megatron_tide.files import atomic_write, fingerprint, refuse_foreign, write_json
from megatron_tide.generate.answer_file import AnswerFile
from megatron_tide.generate.complete import Completion, answers, batches_by_length
from megatron_tide.generate.prompts import Prompt, prompt_ids
from megatron_tide.screen import clock_text
from megatron_tide.tables import ASSISTANT, Message

ANSWERS, OWN, CORPUS, MIXTURE, SUMMARY = "answers.jsonl", "own.jsonl", "corpus.jsonl", "mixture.json", "rollouts.json"
NO_ANSWER_FITS = "a prompt that leaves no room for an answer"
_STREAM = b"prompts"


@dataclass(frozen=True)
class Round:
    """The rows of a round: ``asked`` conversations up to the answer that the student is to write, with their
    ``prompts`` and ``seeds``; and ``kept`` conversations with the answer of the corpus. ``passed``: how many rows were
    passed over for them, by reason.
    """

    asked: list[list[Message]]
    prompts: list[Prompt]
    seeds: list[int]
    kept: list[list[Message]]
    passed: Counter[str]


def draw_round(
    mixture: Mixture, tokenizer: TextTokenizer, *, number: int, seed: int, samples: int, share: float, longest: int
) -> Round:
    """``samples`` rows, of which the student answers the first ``share``, rounded; in an order drawn by (seed, number).

    Rows that ``prepare`` would drop, and those with a prompt of more than ``longest`` tokens, are passed over.

    Raises:
        ValueError: there are fewer rows than ``samples``, or rows that a student wrote: kept, they would be learnt by
            heart.
    """
    written = next((source.spec.path for source in mixture.sources if source.spec.own), None)
    if written is not None:
        raise ValueError(f"{written}: the student wrote its responses; draw a round from the corpus itself")
    own = round(share * samples)
    drawn = Round([], [], [], [], Counter())
    for position in permutation(len(mixture), seed, number, _STREAM).tolist():
        if len(drawn.asked) + len(drawn.kept) == samples:
            break
        row = _row(mixture, tokenizer, position, longest)
        if isinstance(row, str):
            drawn.passed[row] += 1
            continue
        messages, asked, ids = row
        if len(drawn.asked) == own:
            drawn.kept.append(messages)
            continue
        drawn.asked.append(asked)
        changed = first_change(tokenizer, (one["content"] for one in asked))
        drawn.prompts.append(Prompt(ids, str(asked[-1]["content"]), changed=changed))
        drawn.seeds.append(int(fingerprint([seed, number, int(mixture.key[position])])[:15], 16))
    found = len(drawn.asked) + len(drawn.kept)
    if found < samples:
        raise ValueError(
            f"--samples {samples}: the data have {found} rows with a prompt that fits and a response "
            f"({counted(drawn.passed)}); use fewer"
        )
    return drawn


def counted(passed: Mapping[str, int]) -> str:
    """In words, how many rows were passed over, and why."""
    return f"passed over: {', '.join(f'{count} {reason}' for reason, count in sorted(passed.items())) or 'none'}"


def _row(
    mixture: Mixture, tokenizer: TextTokenizer, position: int, longest: int
) -> tuple[list[Message], list[Message], np.ndarray] | str:
    """A conversation, what comes before its response, and the ids of that; or why it is passed over."""
    try:
        spec, messages = mixture.conversation(position)
    except (ValueError, RecursionError):
        return UNREADABLE
    split = TOO_LONG if spec.is_too_long(messages) else split_response(messages)
    if isinstance(split, str):
        return split
    try:
        ids = prompt_ids(tokenizer, split[0])
    except TemplateLimit:  # of the template, not of the row
        raise
    except LeftOut:
        return NOT_WRITTEN
    except (ValueError, RecursionError):
        return REFUSED
    return (messages, split[0], ids) if len(ids) <= longest else NO_ANSWER_FITS


@dataclass(frozen=True)
class Rollouts:
    """The student's answers to a round's prompts, written to ``folder``.

    ``length``: tokens of prompt and answer, those of the training data. An answer that does not end before is cut
    there, as ``prepare`` cuts it, without an end of text that the student did not write. ``decides``: what an answer
    depends on beside its prompt and seed; ``options``: fields of ``DecodingRule``. ``as_written``: rows keep the tokens
    of an answer, and the pass that decided each; otherwise prepare makes tokens of its text.
    """

    folder: Path
    tokenizer: TextTokenizer
    round: Round
    length: int
    batch_size: int
    decides: Any
    options: dict[str, Any]
    as_written: bool = False

    def answer(self, model: Any, world: Any, stopped: Callable[[], bool]) -> bool:
        """Answer what is missing, on all ranks of ``world``; False where one of them was asked to stop."""
        world.on_main(lambda: refuse_foreign(self.folder, [OWN, CORPUS, MIXTURE, SUMMARY], ANSWERS, "a round"))
        missing = set(world.on_main(self._collect))
        every = batches_by_length([prompt.ids for prompt in self.round.prompts], self.batch_size)
        batches = [batch for batch in every if missing & set(batch)]
        part = self._file(self.folder / f"answers-{world.rank}.jsonl")
        mine, tokens, started = batches[world.rank :: world.size], 0, time.monotonic()
        for number, batch in enumerate(mine):
            if stopped():
                break
            found = self._answered(model, batch)
            part.add(found)
            tokens += sum(len(one.ids) for one in found.values())
            spent = time.monotonic() - started
            left = spent / (number + 1) * (len(mine) - number - 1)
            rate = f"{tokens * world.size / spent:,.0f} tokens/s on {world.size} ranks" if world.size > 1 else ""
            rate = rate or f"{tokens / spent:,.0f} tokens/s"
            world.print_rank0(f"answers: batch {number + 1}/{len(mine)}  {rate}  left {clock_text(left)}")
        (tokens,) = world.sum_over_ranks([float(tokens)])
        left_over = world.on_main(self._collect)
        spent = max(world.gather_on_all(time.monotonic() - started))
        if not left_over:
            world.on_main(lambda: self._finish(tokens, spent))
        return not left_over

    def _answered(self, model: Any, batch: list[int]) -> dict[int, Completion]:
        prompts = [self.round.prompts[place].ids for place in batch]
        options = {**self.options, "max_new_tokens": self.length - min(map(len, prompts))}
        seeds = [self.round.seeds[place] for place in batch]
        (found,) = answers(model, self.tokenizer, prompts, batch_size=len(batch), seed=seeds, **options)
        return {batch[number]: self._cut(one) for number, one in found.items()}

    def _cut(self, one: Completion) -> Completion:
        """As if it had been answered alone: what a batch writes behind the length is left out."""
        ids = one.ids[: self.length - len(one.prompt)]
        if len(ids) == len(one.ids):
            return one
        return replace(one, ids=ids, text=self.tokenizer.decode(ids), finished=False, order=one.order[: len(ids)])

    def _file(self, path: Path) -> AnswerFile:
        round_, decides = self.round, [self.decides, "as written"] if self.as_written else self.decides
        return AnswerFile(path, self.tokenizer, round_.prompts, round_.seeds, decides, self.as_written)

    def _collect(self) -> list[int]:
        """Move every rank's answers to the one file; the places of the prompts without one."""
        file = self._file(self.folder / ANSWERS)
        file.take(sorted(self.folder.glob("answers-*.jsonl")))
        return file.missing

    def _finish(self, tokens: float, seconds: float) -> None:
        """The mixture of the round, and what its answers are like. ``tokens``, ``seconds``: of this command."""
        rows, round_, tokenizer = self._file(self.folder / ANSWERS).close(), self.round, self.tokenizer
        said = [str(row["answer"]) for row in rows]
        talks = ([*asked, {"role": ASSISTANT, "content": text}] for asked, text in zip(round_.asked, said))
        own: list[dict[str, Any]] = [{"messages": messages} for messages in talks]
        column = {"written_column": "written"} if self.as_written else {}
        for talk, row in zip(own, rows):
            talk |= {name: {part: row[part] for part in WRITTEN} for name in column.values()}
        sources: list[dict[str, Any]] = [{"path": OWN, "own": True, **column}] if own else []
        sources += [{"path": CORPUS, "own": False}] if round_.kept else []
        for name, lines in ((OWN, own), (CORPUS, [{"messages": messages} for messages in round_.kept])):
            content = "".join(json.dumps(line) + "\n" for line in lines)
            atomic_write(self.folder / name, content.encode("utf-8", "surrogatepass"))
        # The tokens that prepare will make of a text are mostly, but not always, those that the student wrote.
        same = sum(len(tokenizer.encode(text)) == row["tokens"] - row["finished"] for text, row in zip(said, rows))
        summary = {
            "own": len(own),
            "corpus": len(round_.kept),
            "empty": sum(not text.strip() for text in said),
            "finished": sum(bool(row["finished"]) for row in rows),
            "tokens": sum(row["tokens"] for row in rows),
            "as_written": same,
            "passed": dict(round_.passed),
            "now": {"tokens": int(tokens), "seconds": round(seconds, 3)},
        }
        write_json(self.folder / SUMMARY, summary)
        write_json(self.folder / MIXTURE, {"sources": sources})
