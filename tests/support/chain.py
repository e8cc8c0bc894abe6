"""A whole tiny chain on disk: corpus, tokenizers, bridge, prepared data, student and teacher; made by the product."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.bridge import Bridge, load_tokenizer
from megatron_tide.models.init_model import init_model
from tests.support.commands import command
from tests.support.models import tiny_student_config, tiny_teacher_config
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece

BLOCK = 8
WORDS = [
    "add",
    "total",
    "left",
    "right",
    "count",
    "names",
    "value",
    "index",
    "result",
    "number",
    "text",
    "line",
    "items",
    "first",
    "last",
]


@dataclass(frozen=True)
class Chain:
    """Folders of one tiny chain; ``run(out, **settings)`` is a run on it."""

    root: Path

    def paths(self, out: Path) -> dict[str, Any]:
        names = ("student", "teacher", "bridge", "data")
        return {**{name: str(self.root / name) for name in names}, "out": str(out)}

    def run(self, out: Path, **settings: Any) -> dict[str, Any]:
        """The settings of a small run: SMALL, changed by ``settings``."""
        return {**self.paths(out), **SMALL, **settings}

    def flags(self, out: Path, **settings: Any) -> list[str]:
        """The same run as command-line flags."""
        flags = []
        for name, value in self.run(out, **settings).items():
            flag = f"--{name.replace('_', '-')}"
            flags += [flag] if value is True else [flag, str(value)]
        return flags


SMALL: dict[str, Any] = {
    "precision": "fp32",
    "teacher_dtype": "fp32",
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": 4,
    "lr": 3e-3,
    "log_every": 1,
    "save_every": 1000,
    "skip_teacher_probe": True,  # an untrained teacher knows no more than chance
}

LEFT_TO_THE_TOOL = {"mask_token_id", "eos_token_id", "pad_token_id"}
PREPARING = ["--workers", "1", "--shard-rows", "16"]


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short instructions with code answers of various lengths."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        names = chance.choices(WORDS, k=chance.randint(2, 6))
        question = f"Write a function of {' and '.join(names)}."
        answer = f"def {names[0]}({', '.join(dict.fromkeys(names[1:]))}):\n    return {' + '.join(names[1:])}\n"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def tiny_configs() -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiny ones, as large a vocabulary as their tokenizers need."""
    student, teacher = tiny_student_config(), tiny_teacher_config()
    del student["vocab_size"], teacher["vocab_size"]
    return student, teacher


def make_chain(root: Path, rows: int = 48) -> Chain:
    """A tiny chain below ``root``, of :func:`conversations`; its ``student_only`` is data for the student alone."""
    chain = build_chain(root, conversations(rows), *tiny_configs(), BLOCK, (96, 96))
    student = ["--student", str(root / "student"), "--student-length", "96", "--student-block", str(BLOCK)]
    command("prepare")(
        [*student, "--data", str(root / "corpus.jsonl"), *PREPARING, "--out", str(root / "student_only")]
    )
    return chain


def build_chain(
    root: Path,
    talks: list[dict[str, Any]],
    student: dict[str, Any],
    teacher: dict[str, Any],
    block: int,
    lengths: tuple[int, int],
) -> Chain:
    """A chain below ``root`` of ``talks`` and two configs; ``lengths``: the student's and the teacher's, in tokens."""
    root.mkdir(parents=True, exist_ok=True)
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in talks))
    texts = TEXTS + [message["content"] for row in talks for message in row["messages"]]
    train_byte_bpe(root / "tokenizers" / "student", texts, 320)
    train_sentencepiece(root / "tokenizers" / "teacher", texts, 400)
    flags = ["--data", str(corpus), *PREPARING, "--bridge", str(root / "bridge"), "--out", str(root / "data")]
    sides = {"student": student, "teacher": teacher}
    for seed, (side, config), length in zip((1, 2), sides.items(), lengths):
        shapes = root / f"{side}.json"
        kept = {key: value for key, value in config.items() if key not in LEFT_TO_THE_TOOL}
        shapes.write_text(json.dumps({**kept, "block_size": block}))
        init_model(shapes, str(root / "tokenizers" / side), seed, root / side, False)
        flags += [f"--{side}", str(root / side), f"--{side}-length", str(length), f"--{side}-block", str(block)]
    loaded = [load_tokenizer(root / side) for side in sides]
    Bridge.build(*loaded, [row["messages"][1]["content"] for row in talks]).save(root / "bridge")
    command("prepare")(flags)
    return Chain(root)
