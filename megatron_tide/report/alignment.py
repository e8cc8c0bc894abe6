"""A picture of a few sentences: both tokenizers' tokens as boxes over the same bytes, coloured by their chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch, Rectangle

from megatron_tide.bridge import Bridge, TextTokenizer, align_texts, load_tokenizer
from megatron_tide.bridge.show import show_piece
from megatron_tide.data import PreparedData
from megatron_tide.report.reading import Training
from megatron_tide.report.style import MUTED, drawn, new_figure

TEXTS = 4
TEXT_BYTES = 170  # of each text: about two lines
LINE_BYTES = 88  # boxes of a line, one cell a byte
FONT = FontProperties(family="DejaVu Sans Mono", size=8.5)
# Neighbouring chunks differ in shade; the hue says whether a chunk is one token on both sides.
ONE_TO_ONE, SEVERAL, UNALIGNED = ("#bfe3f2", "#8fcbe6"), ("#fbd9a8", "#f5bf73"), "#e58a8a"


@dataclass(frozen=True)
class Box:
    """A token: the bytes [start, end) of its text that it spells, as shown, and its chunk (below 0: none)."""

    start: int
    end: int
    shown: str
    chunk: int


@dataclass(frozen=True)
class Pair:
    """A text on both sides, and which chunks are one token on each."""

    student: list[Box]
    teacher: list[Box]
    one_to_one: frozenset[int]


def pairs_of(training: Training, run_folder: Path) -> list[Pair]:
    """The beginnings of a few responses of a run's data, aligned with its bridge's tokenizers.

    Folders are looked for where the run recorded them, then below ``run_folder``. No tokenizer's own code is run.

    Raises:
        ValueError: in one line, what is missing or does not belong together.
    """
    paths = training.paths
    if not paths.get("bridge") or not paths.get("teacher"):
        raise ValueError(f"{training.label} has no teacher, so there is nothing to align")
    bridge = Bridge.load(_found(paths["bridge"], run_folder))
    student, teacher = (load_tokenizer(_found(paths[side], run_folder)) for side in ("student", "teacher"))
    bridge.check_vocabularies(student, teacher)
    data = PreparedData.open(_found(paths["data"], run_folder), verify=False)
    return align(student, teacher, _texts(data, student), same=bridge.shared)


def align(student: TextTokenizer, teacher: TextTokenizer, texts: Sequence[str], same: bool) -> list[Pair]:
    """``texts`` on both sides; ``same``: one tokenizer, whose tokens are a chunk each."""
    pairs = []
    for aligned in align_texts(student, teacher, texts, same=same):
        sides = (
            (student, aligned.student_ids, aligned.student_chunk),
            (teacher, aligned.teacher_ids, aligned.teacher_chunk),
        )
        counts = [np.bincount(chunk[chunk >= 0], minlength=aligned.n_chunks) for _, _, chunk in sides]
        alone = frozenset(np.flatnonzero((counts[0] == 1) & (counts[1] == 1)).tolist())
        left, right = (_boxes(*side) for side in sides)
        pairs.append(Pair(left, right, alone))
    return pairs


@drawn
def alignment(pairs: Sequence[Pair]) -> Figure:
    """Student above, teacher below, a line of text at a time; lines break where both sides end a chunk."""
    lines = [(number, line) for number, pair in enumerate(pairs) for line in _lines(pair)]
    figure = new_figure(0.62 * len(lines) + 0.5)
    ax = figure.subplots()
    top = 0.0
    for place, (number, (start, end)) in enumerate(lines):
        top -= 2.9 if place and lines[place - 1][0] == number else 3.6
        for lane, side in enumerate(("student", "teacher")):
            ax.text(-0.8, top + 0.5 - lane, side, ha="right", va="center", fontsize=8, color=MUTED)
            for box in getattr(pairs[number], side):
                if start <= box.start and box.end <= end and box.end > box.start:
                    _draw(ax, box, box.start - start, top - lane, pairs[number].one_to_one)
    ax.set(xlim=(-8, LINE_BYTES), ylim=(top - 1.3, -2.2))
    ax.axis("off")
    kinds = (ONE_TO_ONE[1], "one token on both sides"), (SEVERAL[1], "several tokens"), (UNALIGNED, "in no chunk")
    handles = [Patch(facecolor=colour, edgecolor="white", label=label) for colour, label in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _draw(ax: Axes, box: Box, left: float, bottom: float, one_to_one: frozenset[int]) -> None:
    shades = ONE_TO_ONE if box.chunk in one_to_one else SEVERAL
    colour = shades[box.chunk % 2] if box.chunk >= 0 else UNALIGNED
    width = box.end - box.start
    ax.add_patch(Rectangle((left, bottom), width, 0.92, facecolor=colour, edgecolor="white", linewidth=1.2))
    size = FONT.get_size_in_points() * min(1.0, width / max(len(box.shown), 1))
    ax.text(
        left + width / 2,
        bottom + 0.44,
        box.shown,
        ha="center",
        va="center",
        family=FONT.get_family(),
        fontsize=size,
        clip_on=True,
    )


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


def _boxes(tokenizer: TextTokenizer, ids: np.ndarray, chunk: np.ndarray) -> list[Box]:
    pieces = tokenizer.token_bytes(ids)
    ends = np.cumsum([0, *map(len, pieces)])
    known = get_font(findfont(FONT))
    boxes = []
    for piece, start, end, number in zip(pieces, ends[:-1], ends[1:], chunk.tolist()):
        shown = "".join(char if known.get_char_index(ord(char)) else "\u25af" for char in show_piece(piece))
        boxes.append(Box(int(start), int(end), shown, number))
    return boxes


def _lines(pair: Pair) -> Iterator[tuple[int, int]]:
    """Byte ranges of at most ``LINE_BYTES`` (or one long chunk) that end where tokens of both sides end."""
    left, right = ({box.end for box in side} for side in (pair.student, pair.teacher))
    common, start = sorted(left & right | {max(left | right, default=0)}), 0
    for place, end in enumerate(common):
        following = common[place + 1] if place + 1 < len(common) else None
        if following is None or following - start > LINE_BYTES:
            yield start, end
            start = end
