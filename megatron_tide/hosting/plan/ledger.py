"""Bytes by part and phase, and where their sum is largest.

A part is either held from some phase on, or used during one. On the host there is an allocator to reckon with: glibc
gives a block of 32 MiB and more back at once, and keeps smaller pieces, free but resident, for what comes later. So the
most that pieces ever took stays, a little more of it than was asked for, also in a phase that needs few of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

PHASES = (
    "start",
    "teacher loading",
    "teacher sweep",
    "student backward",
    "student reduction",
    "student update",
    "checkpoint",
)
STEPS = PHASES[2:]  # what repeats: from here on, pieces of earlier phases are still there
LARGEST_PIECE = 32 * 2**20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX
# Resident over asked-for, of pieces: 1.2 to 2.3 in runs of a 0.05 B student on CPU (bf16 and fp32, with and without
# recomputation), 1.4 in most.
FRAGMENTED = 1.4
KEPT = "kept by the allocator"
PAGES = "checkpoint pages"  # mapped from files: they count as resident, and are given up when memory is short


@dataclass(frozen=True)
class Peak:
    """The phase in which a place holds most, and its parts."""

    phase: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class Ledger:
    """What one place (a GPU, a node's memory) holds. ``keeps_pieces``: whether glibc is its allocator."""

    def __init__(self, keeps_pieces: bool) -> None:
        self._keeps = keeps_pieces
        self._held: list[tuple[str, float, int]] = []
        self._used: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._pieces: dict[str, float] = defaultdict(float)

    def hold(self, part: str, size: float, since: str = "start") -> None:
        """``size`` bytes from the phase ``since`` to the end."""
        self._held.append((part, size, PHASES.index(since)))

    def use(self, phase: str, part: str, size: float, each: float | None = None) -> None:
        """``size`` bytes during one phase, in tensors of ``each`` (None: it is one tensor)."""
        assert phase in PHASES, phase
        self._used[phase][part] += size
        if (size if each is None else each) < LARGEST_PIECE:
            self._pieces[phase] += size

    def peak(self, *, pages: bool) -> Peak:
        """The largest phase, with or without :data:`PAGES`."""
        return max((self._at(phase, pages) for phase in PHASES), key=lambda peak: peak.bytes)

    def _at(self, phase: str, pages: bool) -> Peak:
        parts: dict[str, float] = defaultdict(float)
        for part, size, since in self._held:
            if since <= PHASES.index(phase):
                parts[part] += size
        for part, size in self._used[phase].items():
            parts[part] += size
        if self._keeps and phase in STEPS:
            most = FRAGMENTED * max(self._pieces[step] for step in STEPS)
            parts[KEPT] += most - self._pieces[phase]
        if not pages:
            parts.pop(PAGES, None)
        return Peak(phase, {part: int(size) for part, size in parts.items() if size >= 1})
