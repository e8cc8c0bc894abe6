"""The 16B recipe with its teacher in every place: one whole chain by the shell, and the training of all of them."""

from __future__ import annotations

import json

import pytest

from megatron_tide import distill
from megatron_tide.choices import TEACHER_HOSTINGS
from megatron_tide.config import CACHED
from tests.recipes.test_recipes import commands, run
from tests.support.disk import HAS_DISK_IO
from tests.support.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(1500)]
RECIPE = "distill_16b_to_0.6b.sh"
STEPS = 3
FLAGS = ["--precision", "fp32", "--teacher-dtype", "fp32", "--global-batch-size", "4", "--micro-batch-size", "1"]
FLAGS += ["--max-steps", str(STEPS), "--log-every", "1", "--temperature", "1", "--tidal", "off", "--skip-teacher-probe"]
MORE_RANKS = ("pipeline_4", "pipeline_8")


def test_the_losses_are_the_same_wherever_the_teacher_is(chain, mixture, tmp_path):
    """The shell starts two ranks, on which a pipeline answers a training without it; the other hostings' trainings get
    the flags that it would start them with.
    """
    hostings = [name for name in TEACHER_HOSTINGS if name not in (*MORE_RANKS, CACHED)]
    hostings = [name for name in hostings if name != "zero3_nvme" or HAS_DISK_IO]
    whole = CACHED
    options = {"TEACHER": str(mixture), "STUDENT": str(chain.root / "student"), "NPROC": "2", "RUNS": str(tmp_path)}
    options |= {"DATA": str(chain.root / "corpus.jsonl"), "STUDENT_LENGTH": "96", "TEACHER_LENGTH": "96"}
    options["STRATEGY"] = "tide-bridge"
    finished = run(RECIPE, *FLAGS, timeout=800, HOSTING="pipeline_2", CACHE="1", NAME=whole, **options)
    assert finished.returncode == 0, (finished.stdout[-2000:], finished.stderr[-2000:])
    assert {"config.json", "README.md"} <= {path.name for path in (tmp_path / whole / "hf").iterdir()}
    assert (tmp_path / whole / "report" / "index.html").exists()
    for hosting in hostings:
        (tmp_path / hosting).mkdir()
        for part in ("bridge", "data"):
            (tmp_path / hosting / part).symlink_to(tmp_path / whole / part)
        disk = {"TEACHER_NVME": str(tmp_path)} if hosting.endswith("nvme") else {}
        words = commands(RECIPE, *FLAGS, HOSTING=hosting, NAME=hosting, **options, **disk)["train-tide-bridge"]
        flags = words[words.index("megatron_tide.distill") + 1 :]
        assert flags[flags.index("--teacher-hosting") + 1] == hosting
        assert run_on_ranks(distill.main, 2, flags, timeout=280) == [0, 0]
    hostings.append(whole)
    curves = {hosting: losses(tmp_path / hosting / "tide-bridge" / "metrics.jsonl") for hosting in hostings}
    total, distilled = curves["replicated"]
    assert len(total) == STEPS
    assert min(distilled) > 0.1, "the teacher should count"
    for hosting, (curve, _) in curves.items():
        assert curve == pytest.approx(total, abs=1e-5), hosting


def losses(metrics):
    """Total loss and its distillation part, by step."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["loss/total"] for row in rows], [row["loss/distill"] for row in rows]
