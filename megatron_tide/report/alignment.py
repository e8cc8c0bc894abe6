"""A few texts as both tokenizers split them, in blocks that end where a token ends on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_tide.bridge import Bridge, TextTokenizer, align_texts, load_tokenizer
from megatron_tide.bridge.loading import TOKENIZER_FILES
from megatron_tide.bridge.show import show_piece
from megatron_tide.data import PreparedData
from megatron_tide.hub import download, public_name
from megatron_tide.report.run_folder import TrainingRun

TEXTS = 4
TEXT_BYTES = 170  # of each text: about two lines
Token = tuple[str, str]  # as shown, and its kind: one0, one1, several0, several1 (neighbours differ), none
Block = tuple[list[Token], list[Token]]  # the student's tokens and the teacher's of the same bytes


def aligned_samples(training: TrainingRun, run_folder: Path) -> list[list[Block]]:
    """The beginnings of a few responses of a run's data, aligned with its bridge's tokenizers.

    Folders are looked for where the run recorded them, then below ``run_folder``. No tokenizer's own code is run, and
    nothing is downloaded.

    Raises:
        ValueError: in one line, what is missing or does not belong together, without the recorded paths.
    """
    paths = training.paths
    if not paths.get("bridge") or not paths.get("teacher"):
        raise ValueError(f"{training.label} has no teacher, so there is nothing to align")
    try:
        return _aligned(paths, run_folder)
    except (ValueError, OSError) as error:
        text = str(error)
        for path in sorted(map(str, paths.values()), key=len, reverse=True):
            text = text.replace(path, public_name(path)) if path else text
        raise ValueError(text) from None


def _aligned(paths: Mapping[str, str], run_folder: Path) -> list[list[Block]]:
    bridge = Bridge.load(_found(paths["bridge"], run_folder))
    student, teacher = (_tokenizer(_found(paths[side], run_folder)) for side in ("student", "teacher"))
    bridge.check_vocabularies(student, teacher)
    data = PreparedData.open(_found(paths["data"], run_folder), verify=False)
    return align(student, teacher, _texts(data, student), same=bridge.shared)


def align(student: TextTokenizer, teacher: TextTokenizer, texts: Sequence[str], same: bool) -> list[list[Block]]:
    """The blocks of each text; ``same``: one tokenizer, whose tokens are a chunk each."""
    found = []
    for aligned in align_texts(student, teacher, texts, same=same):
        chunks = aligned.student_chunk, aligned.teacher_chunk
        counts = [np.bincount(chunk[chunk >= 0], minlength=aligned.n_chunks) for chunk in chunks]
        one_to_one = (counts[0] == 1) & (counts[1] == 1)
        pieces = student.token_bytes(aligned.student_ids), teacher.token_bytes(aligned.teacher_ids)
        ends = [np.cumsum([len(piece) for piece in side], dtype=int) for side in pieces]
        common = np.intersect1d(ends[0], ends[1])
        blocks: list[Block] = [([], []) for _ in range(len(common) + 1)]
        for lane in (0, 1):
            for piece, chunk, block in zip(pieces[lane], chunks[lane], np.searchsorted(common, ends[lane])):
                kind = f"{'one' if one_to_one[chunk] else 'several'}{chunk % 2}" if chunk >= 0 else "none"
                if piece:
                    blocks[block][lane].append((show_piece(piece), kind))
        found.append([block for block in blocks if any(block)])
    return found


def _tokenizer(place: str) -> TextTokenizer:
    if not Path(place).exists():
        place = str(download(place, TOKENIZER_FILES, f"{place}: not on this machine", cached=True))
    return load_tokenizer(place)


def _found(recorded: str, run_folder: Path) -> str:
    """A recorded path where it still is, or the folder of that name beside the run; else as it was (a hub name)."""
    beside = run_folder / Path(recorded).name
    return recorded if Path(recorded).exists() or not beside.exists() else str(beside)


def _texts(data: PreparedData, student: TextTokenizer) -> list[str]:
    """Beginnings of the responses of samples spread over the data, cut at a line or a word."""
    texts: dict[str, None] = {}
    for index in np.arange(TEXTS) * len(data) // TEXTS:
        side = data.sample(int(index)).student
        whole = student.decode(side.ids[side.prompt : side.content_end])
        raw = whole.encode("utf-8")[:TEXT_BYTES].decode("utf-8", errors="ignore")
        cut = len(raw) if len(raw) == len(whole) else max(raw.rfind("\n") + 1, raw.rfind(" ")) or len(raw)
        texts[raw[:cut]] = None
    return [text for text in texts if text]
