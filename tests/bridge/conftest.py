"""Four small tokenizers, trained once a session, and a way to give them names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of byte-level and SentencePiece tokenizers, the latter with and without a dummy prefix."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "student": train_byte_bpe(root / "student", TEXTS, 400),
        "teacher": train_sentencepiece(root / "teacher", TEXTS, 420),
        "prefixed": train_sentencepiece(root / "prefixed", TEXTS, 400, dummy_prefix=True),
    }


@pytest.fixture(scope="session")
def tokenizers(folders: Mapping[str, Path]) -> Mapping[str, TextTokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}
