"""A student's and a teacher's tokenizer, trained on one text: byte-level BPE, and SentencePiece unigram."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_tide.bridge.samples import checked_texts
from megatron_tide.bridge.tiktoken import QWEN_PATTERN
from megatron_tide.files import AtomicFolder, read_json, sha256_file
from megatron_tide.lock import lock_beside
from megatron_tide.tables import LONGEST_TEXT, check_bad, good_rows, parse_messages, read_rows

MASK = "<|mask|>"
END_OF_TEXT = "<|endoftext|>"
RECEIPT = "training.json"
BYTES = 256

STUDENT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEACHER_TEMPLATE = (
    "{% set names = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} %}"
    "{% for message in messages %}"
    "<role>{{ names[message['role']] }}</role>{{ message['content'] }}<|role_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def train_byte_bpe(folder: str | Path, texts: Iterable[str], vocab_size: int, mask: str = MASK) -> Path:
    """Byte-level BPE of ``vocab_size`` tokens in all, in Hugging Face form with a Qwen-style chat template; the folder.

    The vocabulary is smaller where the texts have no more pairs to merge. Eos ``<|im_end|>``, pad ``<|endoftext|>``.
    """
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", mask]
    if vocab_size < BYTES + len(special):
        raise ValueError(f"a byte-level vocabulary needs at least {BYTES + len(special)} tokens, not {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token=END_OF_TEXT, mask_token=mask
    )
    wrapped.chat_template = STUDENT_TEMPLATE
    wrapped.save_pretrained(folder)
    return Path(folder)


def train_sentencepiece(
    folder: str | Path, texts: Iterable[str], vocab_size: int, mask: str = MASK, dummy_prefix: bool = False
) -> Path:
    """SentencePiece unigram with byte fallback and identity normalisation, LLaDA2-style chat template; the folder.

    ``tokenizer.model`` holds every token, the special ones as control pieces; ``tokenizer_config.json`` names them. The
    vocabulary is smaller where the texts do not fill it. Eos and pad ``<|endoftext|>``, as LLaDA2's are one. Without
    ``dummy_prefix`` no space is added before a text: its first word is the same token as after a newline.
    """
    folder, model = Path(folder), io.BytesIO()
    special = [mask, "<role>", "</role>", "<|role_end|>"]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=dummy_prefix,
            hard_vocab_limit=False,
            max_sentence_length=4 * LONGEST_TEXT,  # bytes: longer ones are dropped without a word
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            control_symbols=special,
            # Threads sum scores in any order; one thread gives the same model every time.
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[-160:]
        raise ValueError(f"SentencePiece cannot train {vocab_size} pieces on this data: {reason}") from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "mask_token": mask,
        "chat_template": TEACHER_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class TokenizerTraining:
    """One tokenizer to train: its folder and vocabulary size, the function that trains it and the library of that."""

    folder: Path
    vocab_size: int
    train: Callable[[Path, Sequence[str], int], Path]
    library: str

    def run(self, texts: Sequence[str], data_sha256: str, fresh: bool) -> str:
        """Train, unless the same training is done; returns one line about it. ValueError if the folder contains other
        files.
        """
        receipt = {
            "kind": self.train.__name__,
            "vocab_size": self.vocab_size,
            "data_sha256": data_sha256,
            "library": f"{self.library} {metadata.version(self.library)}",
        }
        if self.folder.exists() and not fresh:
            if self._receipt() == receipt:
                return f"{self.folder}: done, skipped"
            raise ValueError(
                f"{self.folder}: contains a tokenizer of other settings; pass --fresh or use another folder"
            )
        if self.folder.exists() and self._receipt() is None and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder}: not made by this tool, so --fresh does not replace it; use another folder"
            )
        with lock_beside(self.folder), AtomicFolder(self.folder) as draft:
            self.train(draft, texts, self.vocab_size)
            (draft / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
            before, new = ({path.name for path in folder.glob("*")} for folder in (self.folder, draft))
            if before - new:
                raise ValueError(f"{self.folder}: has {min(before - new)}, which this tool does not write; move it")
        return f"{self.folder}: trained"

    def _receipt(self) -> object:
        try:
            return read_json(self.folder / RECEIPT)
        except ValueError:
            return None


def _contents(row: dict[str, Any], where: str) -> list[str]:
    return checked_texts([message["content"] for message in parse_messages(row.get("messages"), where)], where)


def read_messages(path: Path) -> list[str]:
    """Contents of all messages in a JSONL file of conversations; rows that are none are left out and told.

    Raises:
        ValueError: too many of them (``check_bad``), or no message.
    """
    bad: list[str] = []
    rows = list(good_rows(read_rows(path, bad), bad, _contents))
    check_bad(bad, len(rows))
    texts = [text for row in rows for text in row]
    if not texts:
        raise ValueError(f"{path}: no messages to train on; check the path")
    return texts


def train_tokenizers(
    data: Path, student_out: Path, teacher_out: Path, student_vocab: int, teacher_vocab: int, fresh: bool
) -> Iterator[str]:
    """Train both on a JSONL file of conversations, unless that is done; returns one line about each.

    Raises:
        ValueError: invalid data, an impossible vocabulary size, or a folder with other content.
    """
    if student_out.resolve() == teacher_out.resolve():
        raise ValueError(f"{student_out}: the folder of both tokenizers; give each its own")
    texts = read_messages(data)
    digest = sha256_file(data)
    for training in (
        TokenizerTraining(student_out, student_vocab, train_byte_bpe, "tokenizers"),
        TokenizerTraining(teacher_out, teacher_vocab, train_sentencepiece, "sentencepiece"),
    ):
        yield training.run(texts, digest, fresh)
