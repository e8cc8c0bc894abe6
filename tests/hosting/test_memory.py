"""The estimate against measured peaks: two small runs, and the full-size proof as it was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.files import read_json
from megatron_tide.hosting.build import named_hosting
from megatron_tide.hosting.memory import Machine
from megatron_tide.hosting.plan import GIB, plan, run_shape, teacher_needs
from recipes.fullsize import prove
from tests.hosting.backends import rss_bytes
from tests.support.chain import SMALL
from tests.support.disk import needs_disk_io
from tests.support.medium import make_medium_chain
from tests.support.ranks import run_on_ranks
from tests.support.runs import train_and_tell

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = REPOSITORY / "megatron_tide" / "models" / "configs"
TOLERANCE = 0.15
ACCUMULATION = 2  # the recipe's


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    return make_medium_chain(tmp_path_factory.mktemp("medium"))


def train_and_weigh(settings):
    """Train on this rank; its peak resident bytes."""
    train_and_tell(settings)
    return rss_bytes("VmHWM")


def predicted_bytes(run, name):
    """Of one rank without GPU, at its peak."""
    return plan(run, Machine(1, 0, 64 * GIB), named_hosting(name)).host.bytes


REPLICATED = {"precision": "fp32", "teacher_dtype": "fp32", "max_steps": 4}
FROM_DISK = {
    "precision": "bf16",
    "teacher_dtype": "bf16",
    "max_steps": 6,
    "compdemo": True,
    "teacher_hosting": "zero3_nvme",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [("replicated", REPLICATED), pytest.param("zero3_nvme", FROM_DISK, marks=needs_disk_io)]
)
def test_peak_memory_is_predicted(medium, tmp_path, name, settings):
    settings = {**medium.paths(tmp_path / "run"), **SMALL, "global_batch_size": 2, "micro_batch_size": 1, **settings}
    settings |= {"skip_teacher_probe": True} | ({"teacher_nvme": str(tmp_path)} if name == "zero3_nvme" else {})
    config, stats = from_flat(settings), PreparedData.open(settings["data"]).stats
    longest = int(stats.student_length.max()), int(stats.teacher_length.max())
    run = run_shape(config, 1, teacher_needs(config.strategy, False, *longest))
    predicted = predicted_bytes(run, name)
    (measured,) = run_on_ranks(train_and_weigh, 1, settings, timeout=280)
    assert measured <= predicted <= (1 + TOLERANCE) * measured


def test_the_full_size_proof_was_predicted(tmp_path):
    """The committed report, against the plan of the very run that the recipe makes."""
    measured = read_json(REPOSITORY / "benchmarks" / "results" / "fullsize_cpu.json")
    folders = prove.Folders(tmp_path)
    for folder, shape in ((folders.student, "qwen3_0.6b.json"), (folders.teacher, "llada2_mini.json")):
        folder.mkdir(parents=True)
        shutil.copy(SHAPES / shape, folder / "config.json")
    flags = ["--teacher-hosting", "zero3_nvme"]
    config = prove.trainer_config(folders, ACCUMULATION, flags)
    longest = measured["longest_sample"]
    run = run_shape(config, 1, teacher_needs(config.strategy, False, longest["student"], longest["teacher"]))
    assert run.teacher.parameters == pytest.approx(measured["teacher_parameters"], rel=1e-6)  # and router biases
    assert run.student.parameters == measured["student_parameters"]
    peak = measured["peak_rss_bytes"]
    assert peak <= predicted_bytes(run, "zero3_nvme") <= (1 + TOLERANCE) * peak
