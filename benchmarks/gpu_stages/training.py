"""Stage e: real training runs of small models by the package's own command, on NCCL with one rank.

The fp32 curves must be those of tests/train/golden.json, which a CPU wrote; ZeRO 1, ZeRO 2 and offload take the same
steps; a run that is killed goes on where it was. bf16 has another curve, near it. Runs joined in one process share its
start; processes run side by side, because nothing is timed here. Where the libraries of a machine make other tokenizers
or weights than those of golden.json, its own CPU's curve tells which of the two it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages.bench import Bench
from megatron_tide.__main__ import THEN
from tests.support.chain import Chain, make_chain
from tests.support.launch import steps_logged
from tests.support.runs import read_curve
from tests.train.test_golden import CASES, GOLDEN

STEPS = 5  # of every run
EXACT, NEAR = 1e-4, 0.05  # of a loss, absolute below 1 and relative above: fp32, bf16
KILLED, ON_CPU = "killed", "on this CPU"
MARGIN = 8.0  # seconds, to tell what did not end in time
CASE = "tide-bridge"  # of the runs that vary something else: it has every part of the loss

Runs = dict[str, dict[str, Any]]


def run(bench: Bench) -> None:
    chain = make_chain(bench.folder / "chain")
    groups = groups_of(bench.tiny)
    words = {name: words_of(chain, bench.folder, runs) for name, runs in groups.items()}
    processes = {name: start(words[name], bench.folder / f"{name}.log", name == ON_CPU) for name in groups}
    with bench.part("kill"):
        bench.note(**killed(processes[KILLED], bench.folder / KILLED, bench.left * 0.6))
        processes[KILLED] = start(words[KILLED], bench.folder / f"{KILLED}.log", False)
    for name, runs in groups.items():
        with bench.part(name):
            finish(processes[name], bench.folder / f"{name}.log", bench.left - MARGIN)
            for run_name, flags in runs.items():
                bench.note(**{run_name: judged(bench.folder / run_name, flags)})
    if ON_CPU in groups:
        with bench.part("beside this CPU"):
            bench.note(golden_beside_this_cpu=beside_this_cpu(bench.folder))


def killed(process: Any, out: Path, seconds: float) -> dict[str, Any]:
    """End a run without notice after two steps, each of which it has saved."""
    wait_for(lambda: steps_logged(out) >= 2, process, seconds)
    was_at_work = process.poll() is None
    process.kill()
    while process.poll() is None:
        time.sleep(0.02)
    return {"killed_at_work": was_at_work, "steps_before_the_kill": steps_logged(out)}


def groups_of(tiny: bool) -> dict[str, Runs]:
    """Runs by name, in groups that share a process; a group is lost with the first of its runs that fails."""
    other = {**CASES[CASE], "_case": CASE, "no_compile_layers": True}
    zero2, offload = "ds_configs/zero2.json", "ds_configs/zero2_offload.json"
    killed = {KILLED: {**CASES[CASE], "_case": CASE, "save_every": 1}}
    if tiny:
        return {"golden": {"zero2, fp32": {**other, "deepspeed": zero2}}, KILLED: killed}
    return {
        "golden": {f"{case}, zero1, fp32": {**flags, "_case": case} for case, flags in CASES.items()},
        "others": {
            "zero2, fp32": {**other, "deepspeed": zero2},
            "zero1, bf16": {**other, "precision": "bf16", "teacher_dtype": "bf16"},
            "zero2, bf16": {**other, "precision": "bf16", "teacher_dtype": "bf16", "deepspeed": zero2},
        },
        "offload": {
            "zero2 with offload, fp32": {**other, "deepspeed": offload},
            "zero2 with offload, bf16": {**other, "precision": "bf16", "teacher_dtype": "bf16", "deepspeed": offload},
        },
        KILLED: killed,
        ON_CPU: {f"{case}, {ON_CPU}": {**flags, "_case": case} for case, flags in CASES.items()},
    }


def words_of(chain: Chain, folder: Path, runs: Runs) -> list[str]:
    """``distill FLAGS --then distill FLAGS ...``"""
    words: list[str] = []
    for name, settings in runs.items():
        flags = {key: value for key, value in settings.items() if not key.startswith("_")}
        words += [*([THEN] if words else []), "distill", *chain.flags(folder / name, max_steps=STEPS, **flags)]
    return words


def start(words: Sequence[str], log: Path, on_cpu: bool) -> Any:
    """``python -m megatron_tide WORDS`` as one rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    with log.open("wb") as file:
        command = [sys.executable, "-m", "megatron_tide", *words]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def wait_for(happened: Callable[[], bool], process: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None and not happened():
            raise AssertionError(f"the run ended with status {process.poll()} before that")
        if time.monotonic() > deadline:
            raise AssertionError("no time left")
        time.sleep(0.02)


def finish(process: Any, log: Path, seconds: float) -> None:
    wait_for(lambda: process.poll() is not None, process, seconds)
    if process.poll() != 0:
        raise AssertionError(
            f"status {process.poll()}: {' | '.join(log.read_text(errors='replace').splitlines()[-3:])}"
        )


def judged(out: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """How far a curve is from the golden one of its case."""
    golden = json.loads(GOLDEN.read_text())[flags["_case"]]
    limit = NEAR if flags.get("precision") == "bf16" else EXACT
    apart = apart_of(read_curve(out), golden)
    return {"apart": apart, "limit": limit, "within": all(value <= limit for value in apart.values())}


def apart_of(curve: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    """How far the losses of ``curve`` are from the expected ones, by name."""
    return {
        name: max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(curve[name], values, strict=True))
        for name, values in expected.items()
        if name in curve
    }


def beside_this_cpu(folder: Path) -> dict[str, dict[str, float]]:
    """How far the fp32 curves of the GPU are from those that this machine's CPU has just made."""
    return {
        case: apart_of(
            read_curve(folder / f"{case}, zero1, fp32"),
            {name: read_curve(folder / f"{case}, {ON_CPU}")[name] for name in golden},
        )
        for case, golden in json.loads(GOLDEN.read_text()).items()
    }
