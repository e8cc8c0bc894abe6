"""Questions -> answers, resumable: what every benchmark that generates shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tide.data.progress import Progress
from megatron_tide.evaluate.answerers import Answer, Answerer, model_fingerprint
from megatron_tide.evaluate.bootstrap import Estimate, ratio
from megatron_tide.evaluate.presets import Preset
from megatron_tide.evaluate.store import Item, Store, resumed

BATCHES_A_WINDOW = 4  # answers are on the disk after so many batches; prompts of like length are batched within them


@dataclass(frozen=True)
class Score:
    """A benchmark's number: a mean over ``n`` samples, 0 to 1."""

    metric: str
    filter: str
    estimate: Estimate
    n: int

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "filter": self.filter, "n": self.n, **self.estimate.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One model being asked: where results are kept, and what changes for every benchmark alike."""

    answerer: Answerer
    folder: Path
    seed: int = 0
    batch_size: int = 8
    limit: int = 0
    """Samples of each task, from its beginning; 0 for all."""
    samples_per_problem: int = 1
    workers: int = 0
    """Programs run at a time; 0 for one a core."""
    unsafe_programs: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.samples_per_problem < 1 or self.limit < 0 or self.workers < 0:
            raise ValueError(
                "evaluate: batch size and samples per problem must be 1 or more, a limit and workers 0 or more"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, its config, its tokenizer."""
        return model_fingerprint(self.answerer)

    def settings(self, preset: Preset) -> dict[str, Any]:
        """Everything that decides the answers of a benchmark: what its file of results is called after."""
        return {
            "model": self.fingerprint,
            "task": preset.task,
            "few_shot": preset.few_shot,
            "chat_template": preset.chat_template,
            "seed": self.seed if preset.temperature else None,
            **self.answerer.settings(preset),
        }

    def store(self, name: str, preset: Preset) -> Store:
        return Store(self.folder, name, self.settings(preset))

    def ids(self, text: str, preset: Preset) -> np.ndarray:
        """A prompt's ids; what a chat template wrote may hold special tokens, plain text may not."""
        tokenizer = self.answerer.tokenizer
        return tokenizer.encode_prompt(text) if preset.chat_template else tokenizer.encode(text)

    def ask(
        self,
        store: Store,
        preset: Preset,
        prompts: Sequence[tuple[str, str]],
        progress: Progress,
        done: int,
        first: int,
    ) -> list[Answer]:
        """Answers to (key, prompt) pairs. Pair n draws from ``seed + first + n``; ``done`` were answered before."""
        items = []
        for key, text in prompts:
            ids = self.ids(text, preset)
            items.append(Item(key, hashlib.sha256(ids.tobytes()).hexdigest(), ids))

        def compute(contents: list[Any], number: int) -> list[Any]:
            found = self.answerer.answer(contents, preset, seed=self.seed + first + number, batch_size=self.batch_size)
            return [one.to_dict() for one in found]

        values = resumed(
            store, items, compute, BATCHES_A_WINDOW * self.batch_size, lambda count: progress.update(done + count)
        )
        return [Answer(**value) for value in values]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of ``stops``; all of it where none comes."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def mean(values: Sequence[float], seed: int) -> Estimate:
    """Mean of per-sample values with its bootstrap interval over the samples."""
    array = np.asarray(values, dtype=np.float64)
    return ratio(array, np.ones_like(array), seed)
