"""A page as one self-contained HTML file: styles inside, images as data URIs, no script, nothing fetched.

``write_page`` also keeps the images as PNGs beside it, and replaces what an earlier report left there, nothing else.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from megatron_tide.files import TEMPORARY, atomic_write, sweep
from megatron_tide.report.style import NARROW, png

INDEX = "index.html"
MARK = '<meta name="generator" content="megatron_tide report">'
FILES = re.compile(r'<meta name="files" content="([^"]*)">')
CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5c6675; --paper: #ffffff; --edge: #d9dee5; --soft: #f4f6f8;
  --link: #0063a0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --muted: #9aa5b4; --paper: #14181e; --edge: #333b46;
  --soft: #1d232b; --link: #6cb8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--link); }
nav { font-size: .92rem; margin: .8rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.muted, figcaption { color: var(--muted); font-size: .92rem; }
.note { border-left: 3px solid #d08a1d; background: var(--soft); padding: .45rem .8rem; max-width: 46rem;
  font-size: .92rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--edge);
  border-radius: 6px; }
figure.narrow img { width: min(100%, 36rem); }
figcaption { max-width: 46rem; margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem .32rem 0; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap;
  vertical-align: top; }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; }
td.words { white-space: normal; text-align: left; min-width: 16rem; }
.scroll td:last-child, .scroll th:last-child { padding-right: 0; }
pre { background: var(--soft); border: 1px solid var(--edge); border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0;
  overflow-x: auto; font: .84rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass
class Page:
    """A page under construction; ``pictures`` are the PNGs it shows, by file name."""

    title: str
    subtitle: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def add(self, anchor: str, title: str, parts: Iterable[str]) -> None:
        """A section of HTML ``parts``."""
        self.sections.append((anchor, title, "\n".join(parts)))

    def picture(self, name: str, figure: Figure, caption: str) -> str:
        """The HTML of a figure, kept as ``name``.png too; ``caption`` says what is to be seen."""
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
        numbered = (f"{stem}-{number}.png" for number in itertools.count(2))
        file = next(one for one in itertools.chain([f"{stem}.png"], numbered) if one not in self.pictures)
        self.pictures[file] = png(figure)
        data = base64.b64encode(self.pictures[file]).decode("ascii")
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        kind = ' class="narrow"' if figure.get_figwidth() <= NARROW else ""
        return f"<figure{kind}>{image}<figcaption>{escape(caption)}</figcaption></figure>"

    def html(self) -> str:
        links = "\n".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in self.sections)
        body = "\n".join(
            f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{html}\n</section>'
            for anchor, title, html in self.sections
        )
        files = escape(" ".join(sorted(self.pictures)))
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
            f'<meta name="files" content="{files}">\n<link rel="icon" href="data:,">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            f'<h1>{escape(self.title)}</h1>\n<p class="muted">{escape(self.subtitle)}</p>\n<nav>\n{links}\n</nav>\n'
            f"{body}\n</body>\n</html>\n"
        )


def words(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """What is missing, and what would write it."""
    return f'<p class="note">{escape(text)}</p>'


def preformatted(title: str, text: str) -> str:
    return f"<h3>{escape(title)}</h3>\n<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Numbers to the right, the first column to the left; a row shorter than the head ends in one cell of words."""
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        missing = len(head) - len(row)
        if missing:
            plain = "".join(f"<td>{escape(cell)}</td>" for cell in row[:-1])
            cells = f'{plain}<td class="words" colspan="{missing + 1}">{escape(row[-1])}</td>'
        lines.append(f"<tr>{cells}</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def check_out(out: Path) -> None:
    """Refuse a folder that is not a report's.

    Raises:
        ValueError: naming the first thing in ``out`` that no report wrote.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: a file, not a folder; take another --out")
    ours, names = _written(out), (path.name for path in out.iterdir())
    foreign = sorted(name for name in names if name not in ours and not name.startswith(TEMPORARY))
    if foreign:
        raise ValueError(f"{out}: holds {foreign[0]}, which no report wrote; take another --out, or an empty folder")


def write_page(out: Path, page: Page) -> Path:
    """Write index.html and the PNGs into ``out`` in place of an earlier report's; -> the page's path.

    Killed at any moment, it leaves a folder that the next report takes for its own.

    Raises:
        ValueError: ``check_out``'s.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_out(out)
    sweep(out)
    for name in _written(out) - {INDEX}:
        (out / name).unlink(missing_ok=True)
    atomic_write(out / INDEX, page.html().encode("utf-8"))
    for name, content in page.pictures.items():
        atomic_write(out / name, content)
    return out / INDEX


def _written(out: Path) -> set[str]:
    """The names that the report in ``out`` says it wrote; nothing where its index.html is not a report's."""
    try:
        head = (out / INDEX).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return set()
    found = FILES.search(head) if MARK in head else None
    return {INDEX, *found.group(1).split()} if found else set()
