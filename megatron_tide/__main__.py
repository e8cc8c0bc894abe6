"""Distil a large diffusion language model into a small one. Each stage is a command."""

from __future__ import annotations

import difflib
import importlib
import sys
from types import ModuleType

from megatron_tide import cli

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
    "distill": "distill",
    "convert": "commands.convert",
    "generate": "commands.generate",
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
    """Run the command that the first word names; without one, list the commands."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:20}{(command(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
        print("\n".join([f"usage: {cli.PROGRAM} COMMAND --help", "", __doc__ or "", *lines]))
        return 0
    return cli.call(command(argv[0]), argv[1:], f"{cli.PROGRAM} {argv[0]}")


def entry(*words: str) -> None:
    """Run ``words`` plus the command line, and exit: entry point of ``megatron-tide`` and of the scripts in tools/."""
    cli.run(main, [*words, *sys.argv[1:]])


if __name__ == "__main__":
    entry()
