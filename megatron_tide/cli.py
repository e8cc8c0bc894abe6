"""The command line of every command: a frozen dataclass becomes flags, and a user's mistake becomes one error line.

    @dataclass(frozen=True, kw_only=True)
    class Args:
        student: str = flag(..., "Folder of the student", metavar="DIR")     # ... : the flag is required
        limit: int = flag(2000, "Number of texts to read", low=1)
        fresh: bool = flag(False, "Start over")                              # a plain switch

The type of a field is the type of its flag: str, int, float, bool or Path, one of them ``| None``, or ``tuple[T, ...]``
for several values. A field that is a dataclass itself is a group of flags. Flags stay flat, so their names are unique.
A command is a module with a docstring (its help; the part from "Examples:" comes last), ``Args`` and ``run(args)``.
Heavy imports belong inside ``run``, so that help and error messages appear at once.

Why not a library: tyro 1.0 prints a mistake as a box of four to twelve lines and cannot be given another form;
jsonargparse 4.53 names the flags of a group ``--group.flag``, reads lists as JSON, and prints the usage with each
mistake; simple-parsing 0.1.9 fails on a "%" in a help text. They would save the walk over the fields below, and that
walk also reads the JSON of ``--config``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, is_dataclass
from pathlib import Path
from typing import Any

from megatron_tide.errors import end_on_signals, is_of_users, shows_traceback, tell
from megatron_tide.files import is_replaceable, refuse_unlike
from megatron_tide.hub import check_hub_name
from megatron_tide.screen import clean_output, printable

PROGRAM = "python -m megatron_tide"
COMMAND_LINE = "command line"
_INF = float("inf")
MOST = 2**63 - 1
"""Of any number of the command line."""
SEEDS: dict[str, Any] = {"low": 0, "high": 2**31}
"""The range of what random numbers are keyed by, for :func:`flag`."""


def flag(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    low: float = -_INF,
    high: float = _INF,
    metavar: str | None = None,
    shown: str | None = None,
    kind: str = "flag",
    **more: Any,
) -> Any:
    """A dataclass field that is a flag. ``default=...``: it must be given.

    Numbers must be in [``low``, ``high``]. ``shown`` replaces the default in the help. ``kind``: "flag";
    "positional"; "repeated" (a tuple, one value each time the flag is given); "hidden". ``more``: further metadata;
    ``reads`` ("folder", "file", "any" of both, "model", "model or GGUF") or ``writes`` ("file"; of JSON that is written
    anew also ``keys``, of which each has one): what a path names (``check_paths``).
    """
    about = {"help": help, "choices": choices, "low": low, "high": high, "metavar": metavar, "shown": shown}
    return dataclasses.field(default=MISSING if default is ... else default, metadata={**about, "kind": kind, **more})


ONLY_TO_GENERATE = "a GGUF file, which only generate reads; give the release that it was made from"


def flag_name(info: Field[Any]) -> str:
    """``max_steps`` -> ``--max-steps``; ``from_`` -> ``--from``; a positional argument -> ``MODEL``."""
    if info.metadata["kind"] == "positional":
        return info.metadata["metavar"] or info.name.upper()
    return "--" + info.name.rstrip("_").replace("_", "-")


def flags_of(args_type: Any, group: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every flag of a dataclass and of the dataclasses in it: (group, field, type)."""
    hints = typing.get_type_hints(args_type)
    for info in dataclasses.fields(args_type):
        hint = hints[info.name]
        if is_dataclass(hint):
            yield from flags_of(hint, (hint.__doc__ or "").splitlines()[0].rstrip("."))
        else:
            yield group, info, hint


def values_of(args: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Every flag of an instance with its value."""
    for info in dataclasses.fields(args):
        value = getattr(args, info.name)
        if is_dataclass(value):
            yield from values_of(value)
        else:
            yield info, value


def given(args_type: Any, argv: Sequence[str], doc: str, prog: str) -> dict[str, Any]:
    """The flags in ``argv``, ``{field: value}``, without defaults: presets and files can still come in between.

    Raises:
        ValueError: an unknown flag, or a value of another type.
    """
    about, examples, lines = doc.partition("\nExamples:\n")
    parser = Parser(
        prog=prog,
        usage=_usage(args_type, prog),
        description=about.strip(),
        epilog=(examples + lines).strip(),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    add_flags(parser, args_type)
    found, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        names = [flag_name(info) for _, info, _ in flags_of(args_type)]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    return vars(found)


def add_flags(parser: argparse.ArgumentParser, args_type: Any) -> None:
    """Every flag of a dataclass, in its group."""
    groups: dict[str, Any] = {"": parser}
    for title, info, hint in flags_of(args_type):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], info, hint)


def build(args_type: Any, values: Mapping[str, Any], origin: str = COMMAND_LINE) -> Any:
    """The dataclass from ``{field: value}``, flat also where it has groups; the rest are defaults.

    Raises:
        ValueError: one line with the flag: unknown, missing, of another type, not a choice, out of range.
    """
    rest, missing = dict(values), list[str]()
    args = _made(args_type, rest, origin, missing)
    if rest:
        raise ValueError(f"{origin}: unknown flag {sorted(rest)[0]!r}; --help lists them all")
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (see --help)")
    try:
        check(args)
    except ValueError as error:
        raise error if origin == COMMAND_LINE else ValueError(f"{origin}: {error}") from None
    return args


def check(args: Any) -> None:
    """ValueError, one line with the flag, where a value of a dataclass of flags is not a choice, or out of range."""
    for info, value in values_of(args):
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            _check(info, item)


def check_paths(args: Any) -> None:
    """ValueError for a path of a flag that cannot be read or written, before the seconds that imports take."""
    for info, value in values_of(args):
        if not {"reads", "writes"} & set(info.metadata):
            continue
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if info.metadata.get("reads") in ("model", "model or GGUF"):
                check_model_path(str(item), gguf=info.metadata["reads"] != "model")
            else:
                _check_path(info.metadata, flag_name(info), Path(item))


def check_model_path(path: str, *, gguf: bool = False) -> None:
    """ValueError unless ``path`` is a folder, or could be a name on the hub; or, with ``gguf``, a GGUF file."""
    if not path:
        raise ValueError("the name of a model is empty; give a folder, or a name on the hub")
    if path.endswith(".gguf") and not Path(path).is_dir():
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file")
        if not gguf:
            raise ValueError(f"{path}: {ONLY_TO_GENERATE}")
        return
    if not Path(path).is_dir():
        check_hub_name(path)


def parse(command: Any, argv: Sequence[str], prog: str = PROGRAM) -> Any:
    """The checked ``Args`` of a command's module. Its ``defaults(given)``, if it has one, may change defaults."""
    values = given(command.Args, argv, command.__doc__ or "", prog)
    between = command.defaults(values) if hasattr(command, "defaults") else {}
    return build(command.Args, {**between, **values})


def call(command: Any, argv: Sequence[str], prog: str) -> int:
    """Run a command's module; its exit status."""
    args = parse(command, argv, prog)
    check_paths(args)
    return command.run(args) or 0


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Call ``main(argv)`` and exit with its status; an error that its user can mend becomes one line and status 2.

    Such are ValueError, OSError and too little memory; anything else is a bug and keeps its traceback.
    ``MEGATRON_TIDE_TRACEBACK=1`` shows the traceback of those as well. A signal ends it with one line and 128 + its
    number.
    """
    clean_output()
    end_on_signals()
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and (shows_traceback() or not is_of_users(error)):
            raise
        status = tell(error)
    sys.exit(status or 0)


def say(text: object, **more: Any) -> None:
    """``print`` text that may hold names or words of others: lines and tabs stay, a terminal acts on nothing else."""
    print(printable(text), **more)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((120, 24)).columns, 120)
        super().__init__(prog, max_help_position=32, width=width)


class Parser(argparse.ArgumentParser):
    """One whose mistakes are a ValueError, in one line."""

    def error(self, message: str) -> typing.NoReturn:
        message = message.removeprefix("argument ")
        raise ValueError(f"{message if len(message) < 300 else message[:150] + ' ...'} (see {self.prog} --help)")


def _path(text: str) -> Path:
    """A path of the command line; an empty one, as of an unset variable, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _limit(value: float) -> str:
    """A limit in a message, whole numbers with all their digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def number(kind: type[int] | type[float], low: float = -MOST, high: float = MOST) -> Callable[[str], float]:
    """The ``type`` of an argument of a :class:`Parser`: a finite number in [``low``, ``high``]."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            wanted = f"{'whole ' if kind is int else ''}number from {_limit(low)} to {_limit(high)}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a {wanted}")
        return value

    return read


def _usage(args_type: Any, prog: str) -> str:
    """The positional arguments and the required flags; a list of all flags would be too long."""
    words = [prog]
    for _, info, hint in flags_of(args_type):
        name, (kind, many, _) = flag_name(info), kind_of(hint)
        value = info.metadata["metavar"] or kind.__name__.upper()
        many_mark = " ..." if many else ""
        if info.metadata["kind"] == "positional":
            words.append(f"{name}{many_mark}" if info.default is MISSING else f"[{name}{many_mark}]")
        elif info.default is MISSING:
            words.append(f"{name} {value}{many_mark}")
    return " ".join([*words, "[flags]"]).replace("%", "%%")


def _add(group: Any, info: Field[Any], hint: Any) -> None:
    """Add one flag to argparse, without its default."""
    about, (kind, many, optional) = info.metadata, kind_of(hint)
    text = argparse.SUPPRESS if about["kind"] == "hidden" else f"{about['help']}{_default(info)}".replace("%", "%%")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        both = optional and about["kind"] != "hidden"
        group.add_argument(flag_name(info), action=argparse.BooleanOptionalAction if both else "store_true", **options)
        if not both:  # so that the command line can undo a file or preset
            off = {"dest": info.name, "action": "store_false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{flag_name(info)[2:]}", **off)
        return
    options |= {"type": _path if kind is Path else kind, "choices": about["choices"], "metavar": about["metavar"]}
    if not (about["choices"] or about["metavar"]):
        options["metavar"] = info.name.upper() if about["kind"] == "positional" else kind.__name__.upper()
    if about["kind"] == "repeated":
        options["action"] = "append"
    elif many:
        options["nargs"] = "*" if about["kind"] == "positional" else "+"
    elif about["kind"] == "positional":
        options["nargs"] = "?"  # ``build`` reports it if it is missing, together with the flags
    names = [info.name] if about["kind"] == "positional" else [flag_name(info)]
    if about["kind"] != "positional":
        options["dest"] = info.name
    names += ["--" + info.name] if about["kind"] == "hidden" else []  # the form that launchers use
    group.add_argument(*names, **options)


def _default(info: Field[Any]) -> str:
    if info.default is MISSING:
        return "" if info.metadata["kind"] == "positional" else " (required)"
    value = info.default
    if info.metadata["shown"] is not None:
        value = info.metadata["shown"]
    elif value is None or value is False or value in ("", ()):
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def kind_of(hint: Any) -> tuple[Any, bool, bool]:
    """``tuple[T, ...]``, ``T | None`` or ``T`` -> (T, whether there are several, whether None is a value)."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    many = typing.get_origin(hint) is tuple
    return typing.get_args(hint)[0] if many else hint, many, optional


def _made(args_type: Any, values: dict[str, Any], origin: str, missing: list[str]) -> Any:
    """The dataclass, filled from ``values``; used values are removed from ``values``."""
    hints, chosen = typing.get_type_hints(args_type), {}
    for info in dataclasses.fields(args_type):
        hint = hints[info.name]
        if is_dataclass(hint):
            chosen[info.name] = _made(hint, values, origin, missing)
        elif info.name in values:
            chosen[info.name] = _typed(origin, info.name, hint, values.pop(info.name))
        elif info.default is MISSING:
            missing.append(flag_name(info))
    return None if missing else args_type(**chosen)


def _typed(origin: str, name: str, hint: Any, value: Any) -> Any:
    kind, many, optional = kind_of(hint)
    if value is None and optional:
        return None
    if many and isinstance(value, (list, tuple)):
        return tuple(_typed(origin, name, kind, item) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if many or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{origin}: {name} = {value!r} must be {'a list of ' if many else ''}{kind.__name__}")
    return value


def _check(info: Field[Any], value: Any) -> None:
    choices, low, high = (info.metadata[name] for name in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ValueError(f"{flag_name(info)} {value}: choose one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag_name(info)} {value}: must be a finite number")
    if isinstance(value, (int, float)) and abs(value) > MOST:
        raise ValueError(f"{flag_name(info)} {str(value)[:20]}: no number that large is possible")
    if isinstance(value, (int, float)) and not low <= value <= high:
        bound = f"at least {_limit(low)}" if high == _INF else f"between {_limit(low)} and {_limit(high)}"
        raise ValueError(f"{flag_name(info)} {value}: must be {bound}")


def _check_path(about: Mapping[str, Any], name: str, path: Path) -> None:
    reads = about.get("reads")
    if reads == "any" and not path.exists():
        raise ValueError(f"{path}: no such file or folder ({name})")
    if reads == "folder" and not path.is_dir():
        raise ValueError(f"{path}: no such folder ({name})")
    if reads == "file" and not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'} ({name})")
    if about.get("writes") == "file":
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"{name} {path}: {'is a folder' if path.is_dir() else f'no such folder {path.parent}'}")
        if not (is_replaceable(path) and os.access(path.parent, os.W_OK)):  # it is made beside what it replaces
            raise ValueError(f"{name} {path}: cannot be written; use another file")
        if "keys" in about:
            refuse_unlike(path, about["keys"])
