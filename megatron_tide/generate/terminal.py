"""A chat in the terminal; the current block is shown on one line while its masks resolve."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from megatron_tide.bridge import TextTokenizer
from megatron_tide.bridge.changes import first_change
from megatron_tide.choices import BLOCK_LAYOUTS
from megatron_tide.errors import Ended
from megatron_tide.generate.complete import BLOCKS, Moment, prompt_ids
from megatron_tide.screen import plain, printable

MASKED = "░"
QUOTES = '"""'
_CLEAR_LINE = "\r\033[K"
HELP = "/exit or Ctrl-D ends the chat; Ctrl-C stops an answer; /new forgets what was said; /help"
MORE = '''A line is a message, so a pasted list is answered line by line; empty lines are skipped.
""" on a line of its own begins a message of several lines, and ends it.
/new forgets what was said, /exit or Ctrl-D ends the chat, Ctrl-C stops an answer.'''


class LiveText:
    """Prints text as it becomes final and, on a terminal, the block being decided after it."""

    def __init__(self, tokenizer: TextTokenizer, out: TextIO) -> None:
        self._tokenizer, self._out, self._live = tokenizer, plain(out), out.isatty()
        self._line = ""  # what stands on the terminal's last line and is certain

    def show(self, moment: Moment) -> None:
        if self._live:
            self._out.write(_CLEAR_LINE + self._line)
        text = printable(moment.new_text)
        self._out.write(text)
        self._line = (self._line + text).rpartition("\n")[2]
        if self._live:
            self._out.write(self._shortened(self.under_way(moment)))
        self._out.flush()

    def close(self) -> None:
        self._out.write((_CLEAR_LINE + self._line if self._live else "") + "\n")

    def under_way(self, moment: Moment) -> str:
        """The text after the final part: decided tokens as text on one line, others as ``MASKED``."""
        first = moment.decided.index(False) if False in moment.decided else len(moment.ids)
        shown = ""
        for token, decided in zip(moment.ids[first:], moment.decided[first:]):
            shown += self._tokenizer.decode([token]) if decided else MASKED
        return printable(shown.replace("\n", "⏎").replace("\t", " "))

    def _shortened(self, text: str) -> str:
        room = shutil.get_terminal_size().columns - 1 - len(self._line)
        return text[: max(0, room)]


def chat(
    stream: Callable[..., Iterator[Moment]],
    model: Any,
    tokenizer: TextTokenizer,
    *,
    system: str | None = None,
    seed: int = 0,
    ask: Callable[[str], str] = input,
    out: TextIO | None = None,
    **options: Any,
) -> tuple[int, float]:
    """Talk until /exit or the end of input; -> (tokens written, seconds they took).

    ``stream``: that of ``complete`` or ``in_order``, with its ``options``. ``ask(prompt)`` reads the user's next line;
    ``out`` None: standard output.

    Raises:
        ValueError: the chat template refuses the first message; later ones are told, and the chat goes on.
    """
    out = out or sys.stdout
    opening = [{"role": "system", "content": system}] if system else []
    said, tokens, seconds, turn = list(opening), 0, 0.0, 0
    layout = options.get("block_layout", "sequence")
    blocks = f"; blocks begin {BLOCK_LAYOUTS.data[layout].meaning}" if stream is BLOCKS.stream else ""
    out.write(f"({HELP}{blocks})\n")
    told = ""  # once
    for message in _messages(ask, out):
        if message == "/new":
            said = list(opening)
            continue
        try:
            prompt = prompt_ids(tokenizer, [*said, {"role": "user", "content": message}])
        except ValueError as error:  # of this text in this template; what was said before is kept
            if not turn:
                raise
            out.write(f"{printable(str(error))}\n(not sent; /new forgets what was said before)\n")
            continue
        changed = "" if told else first_change(tokenizer, [message])
        if changed:
            told = f"(the tokenizer changes text before the model reads it: {changed})\n"
            out.write(printable(told))
        said.append({"role": "user", "content": message})
        live, started, answer, moment = LiveText(tokenizer, out), time.perf_counter(), "", None
        try:
            for moment in stream(model, tokenizer, prompt, seed=seed + turn, **options):
                answer += moment.new_text
                live.show(moment)
        except Ended:
            raise
        except KeyboardInterrupt:  # ends the answer only
            pass
        live.close()
        seconds += time.perf_counter() - started
        tokens += len(moment.ids) if moment else 0
        said.append({"role": "assistant", "content": answer})
        turn += 1
    return tokens, seconds


def _messages(ask: Callable[[str], str], out: TextIO) -> Iterator[str]:
    """The user's messages and /new, until /exit or the end of input."""
    lines: list[str] | None = None  # of a message between two lines of quotes
    while True:
        try:
            line = ask("you> " if lines is None else "...> ")
        except EOFError:
            line = "/exit" if lines is None else QUOTES
        word = line.strip()
        if word == QUOTES:
            if lines is not None and any(map(str.strip, lines)):
                yield "\n".join(lines)
            lines = [] if lines is None else None
        elif lines is not None:
            lines.append(line)
        elif word == "/exit":
            return
        elif word == "/help":
            out.write(MORE + "\n")
        elif word.startswith("/") and word != "/new" and word[1:].isalpha():
            out.write(f"{printable(word)}: no such command; /help lists them\n")
        elif word:
            yield word
