"""One optimizer step at full size, measured part by part: `recipes/fullsize_cpu_proof.sh` makes what it needs.

The parts are the trainer's own (train.build, hosting, train_step, checkpoint), put together here so that the teacher's
shards can be made one at a time and every part can be timed. What follows the options below goes to the trainer.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from megatron_tide import cli, distill
from megatron_tide.bridge import load_tokenizer
from megatron_tide.config import DistillConfig
from megatron_tide.files import read_json, write_json
from megatron_tide.hosting.build import DTYPES, hosting_of
from megatron_tide.hosting.zero3 import Zero3Teacher
from megatron_tide.machine import matmul_rate
from megatron_tide.models import fresh_model, parameter_count, write_folder
from megatron_tide.models.init_model import complete_config
from megatron_tide.models.layer_specs import layer_specs_of
from megatron_tide.train import build, checkpoint
from megatron_tide.train.distributed import destroy_distributed, init_distributed
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.step import global_counts, train_step
from megatron_tide.training_checkpoint import TrainState
from recipes.fullsize.measure import Timings, folder_bytes, stop_above, sweep_operations
from recipes.fullsize.shards import MadeShards


@dataclass(frozen=True)
class Folders:
    """Where things lie, below the run folder; what is large is in one folder, which the recipe removes."""

    run: Path

    @property
    def student(self) -> Path:
        return self.run / "fullsize" / "student"

    @property
    def teacher(self) -> Path:
        return self.run / "fullsize" / "teacher"

    @property
    def trained(self) -> Path:
        return self.run / "fullsize" / "trained"


def check_disk(folders: Folders, disk: Path, teacher: dict[str, Any], student: dict[str, Any]) -> int:
    """Say what is needed, and refuse (ValueError) a disk without it; -> bytes."""
    teacher_bytes, student_count = 2 * parameter_count(teacher), parameter_count(student)
    # The teacher where it is hosted, its largest shard beside it; the student as it starts (bf16), and a checkpoint.
    largest = max(sum(t.numel() for t in layer.tensors.values()) for layer in layer_specs_of(teacher).layers)
    needed = teacher_bytes + 2 * largest + 2 * student_count + 12 * student_count
    free = min(shutil.disk_usage(place).free for place in (folders.run, disk))
    print(f"disk: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", flush=True)
    if free < needed:
        raise ValueError(f"{disk}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} free; give DISK, another disk")
    return needed


def make_models(folders: Folders, shapes: dict[str, dict[str, Any]], seed: int) -> None:
    """The student whole, with random weights; of the teacher all but its weights."""
    for side, folder in (("student", folders.student), ("teacher", folders.teacher)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        load_tokenizer(folders.run / "tokenizers" / side).save(folder)
    write_json(folders.teacher / "config.json", shapes["teacher"])
    write_folder(fresh_model(shapes["student"], seed), folders.student, torch.bfloat16)


def trainer_config(folders: Folders, accumulation: int, flags: list[str]) -> DistillConfig:
    """The run: TIDE-Cross with CompDemo, micro-batches of one sample, one step."""
    paths = {"student": folders.student, "teacher": folders.teacher, "bridge": folders.run / "bridge"}
    paths |= {"data": folders.run / "data", "out": folders.trained}
    own = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    own += ["--strategy", "tide-cross", "--compdemo", "--activation-checkpointing", "--max-steps", "1"]
    own += ["--micro-batch-size", "1", "--global-batch-size", str(accumulation)]
    config: DistillConfig = cli.parse(distill, [*own, *flags]).run
    config.check()
    return config


def prove(folders: Folders, config: DistillConfig, seed: int) -> dict[str, Any]:
    """Host the teacher, take one step, save; -> what was measured."""
    parts, world = Timings(), init_distributed()
    inputs = read_run_inputs(config, world.size)
    specs, dtype = layer_specs_of(folders.teacher), DTYPES[config.teacher.teacher_dtype]
    shards = MadeShards(folders.teacher, specs, dtype, seed)
    hosting = hosting_of(config.teacher, world.size)
    nvme = Path(hosting.settings["zero_optimization"]["offload_param"]["nvme_path"])
    with parts("make the teacher's shards and take them in"):
        backend = Zero3Teacher(specs, shards, hosting.settings, dtype, inputs.strategy, world)
    with parts("student and its engine"):
        built, loader = build.build(config, inputs, world, backend=backend)
    with parts("first sweep over nothing: DeepSpeed learns the order"):
        backend.engine([])
    with parts("sweep over nothing: what the disk gives"):
        backend.engine([])
    microbatches = loader(0)
    counts, _ = global_counts(microbatches, world, False)
    with parts("optimizer step"):
        train_step(built, microbatches, counts, progress=0.0)
    clock = built.clock.read()
    disk = folder_bytes(nvme, folders.run)
    with parts("checkpoint"):
        checkpoint.save(folders.trained, built.engine, TrainState(step=1, total_steps=1), inputs.run, world, keep=1)
    taken = parts.parts
    idle = taken["sweep over nothing: what the disk gives"]
    asked = [noised.teacher.input_ids.shape for noised in microbatches if noised.teacher is not None]
    work = sweep_operations(
        specs, [(n, length) for n, length in asked], sum(len(b.teacher_targets) for b in microbatches)
    )
    rates = {"matmul_flops": matmul_rate(dtype), "disk_bytes_per_second": idle["bytes_read"] / idle["seconds"]}
    bounds = {
        "compute_seconds": work / rates["matmul_flops"],
        "disk_seconds": taken["optimizer step"]["bytes_read"] / rates["disk_bytes_per_second"],
    }
    stats = inputs.data.stats
    destroy_distributed()
    return {
        "peak_rss_bytes": parts.peak,
        "disk_bytes": max(disk, folder_bytes(nvme, folders.run)),
        "teacher_bytes": shards.bytes,
        "teacher_bytes_read": taken["optimizer step"]["bytes_read"],
        "longest_sample": {"student": int(stats.student_length.max()), "teacher": int(stats.teacher_length.max())},
        "teacher_tokens": sum(n * length for n, length in asked),
        "student_tokens": sum(noised.student.input_ids.numel() for noised in microbatches),
        "sweep_operations": work,
        "seconds": {
            "making the teacher's shards": shards.seconds,
            **{name: part["seconds"] for name, part in taken.items()},
            "teacher sweep": clock["teacher"],
            "student forward, backward, update": clock["student"],
        },
        "rates": rates,
        "limits": {**bounds, "sweep_over_the_slower": clock["teacher"] / max(bounds.values())},
        "parts": taken,
    }


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the recipe's folder")
    parser.add_argument("--teacher-shape", type=Path, required=True, metavar="JSON", help="config.json of the teacher")
    parser.add_argument("--student-shape", type=Path, required=True, metavar="JSON", help="config.json of the student")
    parser.add_argument(
        "--accumulation",
        type=cli.number(int, 1, 1024),
        default=2,
        help="micro-batches in the step (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-gib", type=cli.number(float, 1, 1 << 20), default=22.0, help="stop above (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=cli.number(int, 0, 2**31), default=42, help="of weights and noise (default: %(default)s)"
    )
    arguments, flags = parser.parse_known_args(argv)
    folders, started = Folders(arguments.run), time.perf_counter()
    stop_above(int(arguments.memory_gib * 2**30))
    shapes = {}
    for side, path in (("student", arguments.student_shape), ("teacher", arguments.teacher_shape)):
        shapes[side] = complete_config(read_json(path), load_tokenizer(folders.run / "tokenizers" / side))
    disk = Path(dict(itertools.pairwise(flags)).get("--teacher-nvme", ""))
    if not disk.name:
        raise ValueError("--teacher-nvme DIR: is missing; name a folder on a fast disk")
    needed = check_disk(folders, disk, shapes["teacher"], shapes["student"])
    make_models(folders, shapes, arguments.seed)
    figures = prove(folders, trainer_config(folders, arguments.accumulation, flags), arguments.seed)
    counts = {f"{side}_parameters": parameter_count(shape) for side, shape in shapes.items()}
    figures = {**counts, **figures, "disk_needed_bytes": needed, "seconds_in_all": time.perf_counter() - started}
    report("fullsize_cpu", figures, arguments.run / "report.json")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    cli.run(main)
