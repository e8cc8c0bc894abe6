"""Two small trained tokenizers, their bridge, and conversations; made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_tide.bridge import Bridge, TextTokenizer, load_tokenizer
from megatron_tide.data.encode import Dropped, Encoded, Encoder, TokenizerSettings
from megatron_tide.tables import Message
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece


@dataclass(frozen=True)
class Pair:
    """The tokenizers' folders, themselves, and the bridge in ``bridge_path``."""

    student_path: Path
    teacher_path: Path
    bridge_path: Path
    student: TextTokenizer
    teacher: TextTokenizer
    bridge: Bridge

    def encoder(self, student_length: int = 64, teacher_length: int = 128, block: int = 8) -> Encoder:
        return Encoder(
            student=TokenizerSettings(tokenizer=self.student, length=student_length, block=block),
            teacher=TokenizerSettings(tokenizer=self.teacher, length=teacher_length, block=2 * block),
            bridge=self.bridge,
        )

    def student_only(self, length: int = 64, block: int = 8) -> Encoder:
        return Encoder(student=TokenizerSettings(tokenizer=self.student, length=length, block=block))

    def flags(self) -> list[str]:
        paths = {"--student": self.student_path, "--teacher": self.teacher_path, "--bridge": self.bridge_path}
        return [part for flag, path in paths.items() for part in (flag, str(path))]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("tokenizers")
    student_path = train_byte_bpe(folder / "student", TEXTS, 320)
    teacher_path = train_sentencepiece(folder / "teacher", TEXTS, 400)
    student, teacher = load_tokenizer(student_path), load_tokenizer(teacher_path)
    bridge = Bridge.build(student, teacher, TEXTS)
    bridge.save(folder / "bridge")
    return Pair(student_path, teacher_path, folder / "bridge", student, teacher, bridge)


def encode(encoder: Encoder, messages: list[Message], key: int = 0) -> Encoded | Dropped:
    """What comes of one row."""
    (row,) = encoder.encode_rows([(key, messages)])
    return row


def conversation(number: int) -> list[dict[str, str]]:
    """A conversation whose response grows with its number, up to lengths that must be cut."""
    response = f"value_{number} = {number}\n" + "print('again and again')\n" * (number % 17)
    messages = [{"role": "user", "content": f"Print line {number}."}, {"role": "assistant", "content": response}]
    return [{"role": "system", "content": "Answer in code."}, *messages] if number % 3 == 0 else messages


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Callable[[int], Path]:
    """A function: number of conversations -> a JSONL file of them."""
    return lambda count: write_jsonl(tmp_path / "chats.jsonl", [{"messages": conversation(n)} for n in range(count)])
