"""How every figure looks: one set of matplotlib settings, colours that most eyes can tell apart, and nothing global."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

DPI = 140  # dots per inch: sharp on dense screens at the page's width
WIDTH, NARROW = 10.0, 5.6  # inches: the page's width, and what one panel needs
INK, MUTED = "#1c2430", "#5c6675"
# Okabe and Ito's palette without its yellow (too faint for a line on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a label may hold a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "image.cmap": "viridis",
}
styled = matplotlib.style.context(
    SETTINGS, after_reset=True
)  # a decorator: draws alike whatever the user's matplotlibrc


def new_figure(height: float, narrow: bool = False) -> Figure:
    """An empty figure ``height`` inches high that makes room for its labels."""
    return Figure(figsize=(NARROW if narrow else WIDTH, height), layout="constrained")


@styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": "megatron_tide"})
    return content.getvalue()


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each label: the same in every figure of a page."""
    return {
        label: {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}
        for place, label in enumerate(labels)
    }
