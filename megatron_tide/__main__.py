"""Distil a large diffusion language model into a small one. Each stage is a command.

Commands joined by --then run in one process, which imports its libraries once, and end with the first that fails.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Iterator
from types import ModuleType

from megatron_tide import cli

THEN = "--then"
# In the order of a run.
COMMANDS = {
    "corpus": "commands.corpus",
    "train-tokenizers": "commands.train_tokenizers",
    "init-model": "commands.init_model",
    "sample": "commands.sample",
    "bridge": "commands.bridge",
    "inspect": "commands.inspect",
    "prepare": "commands.prepare",
    "build-ops": "commands.build_ops",
    "plan": "commands.plan",
    "cache": "commands.cache",
    "distill": "distill",
    "convert": "commands.convert",
    "convert-gguf": "commands.convert_gguf",
    "generate": "commands.generate",
    "rollout": "commands.rollout",
    "evaluate": "commands.evaluate",
    "inference-benchmark": "commands.inference_benchmark",
    "report": "commands.report",
}


def command(name: str) -> ModuleType:
    """The module of a command.

    Raises:
        ValueError: there is no such command.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise ValueError(f"{cli.PROGRAM} {name}: no such command; {hint}")
    return importlib.import_module(f"megatron_tide.{COMMANDS[name]}")


def main(argv: list[str]) -> int:
    """Run the commands that ``argv`` names, one after the other; without one, list them."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:20}{(command(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
        usage = f"usage: {cli.PROGRAM} COMMAND --help\n       {cli.PROGRAM} COMMAND FLAGS [{THEN} COMMAND FLAGS ...]"
        print("\n".join([usage, "", __doc__ or "", *lines]))
        return 0
    calls = []
    for words in split_commands(argv):  # all of them are understood before the first one runs
        called = command(words[0])
        calls.append((called, cli.parse(called, words[1:], f"{cli.PROGRAM} {words[0]}")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    for called, args in calls:
        for number, handler in handlers.items():  # training stops at its next step when asked: the next command at once
            signal.signal(number, handler)
        cli.check_paths(args)  # now: the command before may have written what this one reads
        if status := called.run(args) or 0:
            return status
    return 0


def split_commands(argv: list[str]) -> Iterator[list[str]]:
    """The words of each command.

    Raises:
        ValueError: there is no command beside a ``--then``.
    """
    words: list[str] = []
    for word in (*argv, THEN):
        if word != THEN:
            words.append(word)
        elif not words:
            raise ValueError(f"{cli.PROGRAM}: {THEN} needs a command before and after it (see --help)")
        else:
            yield words
            words = []


def entry(*words: str) -> None:
    """Run ``words`` plus the command line, and exit: entry point of ``megatron-tide`` and of the scripts in tools/."""
    cli.run(main, [*words, *sys.argv[1:]])


if __name__ == "__main__":
    entry()
