"""The house: imports point one way, files and functions stay short enough to read."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_tide"
# Each may import what stands before it, and itself.
ORDER = [
    "bounds",
    "files",
    "gguf_header",
    "hub",
    "tables",
    "screen",
    "errors",
    "workers",
    "ranks",
    "scheduler",
    "lock",
    "cli",
    "choices",
    "clock",
    "gpus",
    "machine",
    "fast",
    "presets",
    "config",
    "ds_config",
    "optimizer",
    "ds_ops",
    "bridge",
    "data",
    "diffusion",
    "models",
    "objectives",
    "training_checkpoint",
    "hosting",
    "generate",
    "sandbox",
    "evaluate",
    "train",
    "release",
    "report",
    "distill",
    "commands",
    "__main__",
]
SOURCES = [
    path
    for folder in ("megatron_tide", "tools", "recipes", "benchmarks")
    for path in REPOSITORY.glob(f"{folder}/**/*.py")
]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_tide"):
            inner = node.module.split(".")[1:2]
            found.update(inner or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("megatron_tide."))
    return found & set(ORDER)


def test_every_part_has_its_place():
    parts = {part_of(path) for path in PACKAGE.glob("**/*.py")} - {"__init__"}
    assert parts == set(ORDER)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if path.parent == PACKAGE and path.stem == "__init__":
        return
    place = ORDER.index(part_of(path))
    assert {part for part in imported_parts(path) if ORDER.index(part) > place} == set()


def test_no_modules_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in PACKAGE.glob("**/*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {}
    for name, path in modules.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        froms = [(node.module, a.name) for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]
        wanted = [f"{module}.{inner}" if f"{module}.{inner}" in modules else module for module, inner in froms]
        wanted += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        graph[name] = set(wanted) & set(modules) - {name}
    list(TopologicalSorter(graph).static_order())  # CycleError names them


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []
