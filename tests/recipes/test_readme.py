"""What the README says is so: its commands exist and start, its links lead somewhere, its tables match the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tide.choices import TEACHER_HOSTINGS

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
MORE = {name: (REPOSITORY / name / "README.md").read_text(encoding="utf-8") for name in ("recipes", "benchmarks")}
BLOCKS = re.findall(r"```bash\n(.*?)```", "\n".join([README, *MORE.values()]), flags=re.S)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if line))


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["bash recipes/quickstart.sh", "bash tests/run.sh"]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_things_that_exist(command):
    words = [word for word in command.split() if "=" not in word or word.startswith("-")]
    if words[0] == "bash":
        assert (REPOSITORY / words[1]).is_file()
        assert subprocess.run(["bash", "-n", str(REPOSITORY / words[1])]).returncode == 0
    elif words[0] == "python":
        target = words[1 : 2 if words[1] != "-m" else 4 if words[2] == "megatron_tide" else 3]
        shown = subprocess.run(
            [sys.executable, *target, "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, shown.stderr
        for flag in (word for word in words if word.startswith("--")):
            assert flag.partition("=")[0] in shown.stdout
    else:
        assert words[0] in {"pip", "tensorboard", "sbatch", "git", "cd", "torchrun", "source"}


TEXTS = {".": README + CONTRIBUTING, **MORE}
LINKS = sorted({(folder, target) for folder, text in TEXTS.items() for target in re.findall(r"\]\(([^)#]+)\)", text)})


@pytest.mark.parametrize(("folder", "target"), LINKS)
def test_link_leads_somewhere(folder, target):
    assert target.startswith("https://") or (REPOSITORY / folder / target).exists()


SLURM = (REPOSITORY / "slurm" / "README.md").read_text(encoding="utf-8")


def test_the_cluster_readme_names_things_that_exist():
    for path in re.findall(r"^(?:\S+=\S+ )*(?:sbatch|bash)(?: --\S+)* (slurm/\S+)", SLURM, flags=re.M):
        assert (REPOSITORY / path).is_file()
    for name in re.findall(r"^\| `([\w.]+\.sh)`", SLURM, flags=re.M):
        assert (REPOSITORY / "slurm" / name).is_file() or name == "cluster.sh"
    hostings = set(re.findall(r"^\| [^|]* \| `(\w+)` \|", SLURM, flags=re.M)) - {"HOSTING"}
    assert {"replicated", "zero3_cpu"} <= hostings <= set(TEACHER_HOSTINGS)
    job = (REPOSITORY / "slurm" / "job.sh").read_text(encoding="utf-8")
    for word in re.findall(r"^\| `([a-z ]+):` \|", SLURM, flags=re.M):
        assert f"'{word}: " in job or f"requeue 130 {word} " in job or f'requeue "$status" "{word}"' in job


def test_every_strategy_is_in_the_table():
    from megatron_tide.objectives import STRATEGIES

    assert set(STRATEGIES) == set(re.findall(r"^\| `([a-z][a-z0-9-]+)` \|", README, flags=re.M))


def test_every_family_is_in_the_table():
    from megatron_tide.models.families import FAMILIES

    table = README.partition("### Models")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert {row[1].strip("`") for row in rows} == set(FAMILIES)


def test_the_tables_that_contributing_names_exist():
    cells = re.findall(r"\|([^|]*`[A-Z_]{4,}`[^|]*) in \[[^]]*\]\(([^)]*\.py)\)", CONTRIBUTING)
    found = {table: path for cell, path in cells for table in re.findall(r"`([A-Z_]{4,})`", cell)}
    assert {"FAMILIES", "STRATEGIES", "NOISE_SCHEDULES", "OPTIMIZERS", "TEACHER_HOSTINGS"} <= set(found)
    for table, path in found.items():
        assert re.search(rf"^{table}\b", (REPOSITORY / path).read_text(), re.MULTILINE), (table, path)
