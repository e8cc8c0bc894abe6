"""A whole tiny chain on disk: corpus, tokenizers, bridge, prepared data, student and teacher; made by the product."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.bridge import Bridge, load_tokenizer
from megatron_tide.data import prepare
from tests.support.models import tiny_student_config, tiny_teacher_config
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece
from tools import init_model

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
    """Folders of one tiny chain; ``run(out, **knobs)`` is a run on it."""

    root: Path

    def paths(self, out: Path) -> dict[str, Any]:
        names = ("student", "teacher", "bridge", "data")
        return {**{name: str(self.root / name) for name in names}, "out": str(out)}

    def run(self, out: Path, **knobs: Any) -> dict[str, Any]:
        """The knobs of a small run: SMALL, changed by ``knobs``."""
        return {**self.paths(out), **SMALL, **knobs}

    def flags(self, out: Path, **knobs: Any) -> list[str]:
        """The same run as command-line flags."""
        flags = []
        for name, value in self.run(out, **knobs).items():
            flag = f"--{name.replace('_', '-')}"
            flags += [flag] if value is True else [flag, str(value)]
        return flags


SMALL: dict[str, Any] = {
    "precision": "fp32",
    "teacher_dtype": "fp32",
    "global_batch": 8,
    "micro_batch": 4,
    "max_steps": 4,
    "lr": 3e-3,
    "log_every": 1,
    "save_every": 1000,
    "skip_teacher_probe": True,  # an untrained teacher knows no more than chance
}


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


def make_chain(root: Path, rows: int = 48) -> Chain:
    """Build everything below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    corpus = root / "corpus.jsonl"
    talks = conversations(rows)
    corpus.write_text("".join(json.dumps(row) + "\n" for row in talks))
    texts = TEXTS + [message["content"] for row in talks for message in row["messages"]]
    train_byte_bpe(root / "tokenizers" / "student", texts, 320)
    train_sentencepiece(root / "tokenizers" / "teacher", texts, 400)
    for side, config in (("student", tiny_student_config()), ("teacher", tiny_teacher_config())):
        shapes = root / f"{side}.json"
        left_to_the_tool = {"vocab_size", "mask_token_id", "eos_token_id", "pad_token_id"}
        kept = {key: value for key, value in config.items() if key not in left_to_the_tool}
        shapes.write_text(json.dumps({**kept, "block_size": BLOCK}))
        init_model.make(shapes, str(root / "tokenizers" / side), 1 if side == "student" else 2, root / side, False)
    student, teacher = (load_tokenizer(root / side) for side in ("student", "teacher"))
    Bridge.build(student, teacher, [row["messages"][1]["content"] for row in talks]).save(root / "bridge")
    both = ["--student", str(root / "student"), "--student-length", "96", "--student-block", str(BLOCK)]
    other = ["--teacher", str(root / "teacher"), "--teacher-length", "96", "--teacher-block", str(BLOCK)]
    common = ["--data", str(corpus), "--workers", "1", "--shard-rows", "16"]
    prepare.main([*both, *other, *common, "--bridge", str(root / "bridge"), "--out", str(root / "data")])
    prepare.main([*both, *common, "--out", str(root / "one_sided")])
    return Chain(root)
