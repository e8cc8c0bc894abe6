"""A chain of models that weigh something: a student of 20 M and a teacher of 57 M parameters, every sample full length.

Memory is measured on it: what a process takes for itself is no longer most of it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.support.chain import WORDS, Chain, build_chain
from tests.support.models import tiny_student_config, tiny_teacher_config

BLOCK, STUDENT_LENGTH, TEACHER_LENGTH = 32, 256, 512
STUDENT: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
TEACHER: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "moe_intermediate_size": 192,
}


def make_medium_chain(root: Path, rows: int = 8) -> Chain:
    """Build everything below ``root``; every sample is cut at the student's length."""
    chance = random.Random(0)
    lines = ("    " + " = ".join(chance.choices(WORDS, k=3)) for _ in range(rows * 120))
    answers = ["def f():\n" + "\n".join(next(lines) for _ in range(120)) for _ in range(rows)]
    talks = [
        {"messages": [{"role": "user", "content": "Write."}, {"role": "assistant", "content": text}]}
        for text in answers
    ]
    configs = tiny_student_config(**STUDENT), tiny_teacher_config(**TEACHER)
    return build_chain(root, talks, *configs, BLOCK, (STUDENT_LENGTH, TEACHER_LENGTH))
