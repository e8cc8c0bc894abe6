"""benchmarks/gpu.py: a stage that fails costs only itself; and the code of every stage, at toy size on a CPU."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Stage, chosen, run_stages
from benchmarks.gpu_stages import bench as bench_module
from benchmarks.gpu_stages import generation, hostings, limits, parts, real, switches, training, waits
from benchmarks.gpu_stages.bench import Bench, stated_tflops, work
from megatron_tide import cli, errors
from megatron_tide.__main__ import main
from tests.support import launch
from tests.support.chain import Chain
from tests.support.ranks import run_on_ranks

SETTINGS = {"device": "cpu", "tiny": True, "real_weights": ""}


def test_a_stage_that_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORKER", (str(Path(__file__).with_name("worker.py")),))
    monkeypatch.setattr(gpu, "LEFT", 0.01)
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    ways = ("ok", "dies early", "faults", "overruns", "in parts", "ok")
    stages = [Stage(letter, how, how, 2 if how == "overruns" else 60) for letter, how in zip("abcdef", ways)]
    written: list[list[str]] = []
    real_write = gpu.write_json
    monkeypatch.setattr(
        gpu, "write_json", lambda path, value: (real_write(path, value), written.append([*value["stages"]]))
    )
    out = tmp_path / "made" / "gpu.json"
    record = run_stages(stages, {**SETTINGS, "tiny": False}, out, 120)
    said = [found["status"] for found in record["stages"].values()]
    assert said == ["ok", "failed (status 3)", "failed (status -6)", "overran its 2 s", "failed in parts", "ok"]
    assert json.loads(out.read_text()) == record
    assert written == [[*"abcdef"[: count + 1]] for count in range(6)]
    assert record["stages"]["d"]["log"] == ["still here"]  # what it said, and what it had measured
    assert record["stages"]["d"]["limits"] == record["stages"]["a"] | {"limits": {}}
    assert list(tmp_path.glob("gpu-*")) == []


def test_a_stage_that_has_no_time_left_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORKER", (str(Path(__file__).with_name("worker.py")),))
    record = run_stages([Stage("a", "late", "overruns", 60)], SETTINGS, tmp_path / "gpu.json", 1.0)
    assert record["stages"]["a"]["status"] == "not run: no time left"


ENDED = """
import sys
from benchmarks import gpu
from megatron_tide import cli
gpu.WORKER, gpu.STAGES = (sys.argv[1],), (gpu.Stage("a", "long", "overruns", 60),)
cli.run(gpu.main, ["--tiny", "--device", "cpu", "--out", sys.argv[2]])
"""


def test_none_of_its_processes_outlives_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ENDED, str(Path(__file__).with_name("worker.py")), str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PYTHONPATH": str(launch.REPOSITORY), "TMPDIR": str(tmp_path)}
    process, child = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True), ""
    while not child and process.poll() is None:
        time.sleep(0.05)
        child = "".join(path.read_text() for path in tmp_path.glob("gpu-*/child"))
    process.terminate()
    assert process.communicate()[1] == "interrupted\n"
    assert process.returncode == errors.EXIT_INTERRUPTED
    deadline, command = time.monotonic() + 20, Path(f"/proc/{child}/cmdline")
    while command.exists() and command.read_bytes():  # a zombie has none
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(tmp_path.glob("gpu-*")) == []


def test_what_is_not_installed_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package", "nor_this_one"))
    with pytest.raises(ValueError, match="this Python has no no_such_package, nor_this_one; "):
        gpu.main(["--tiny", "--device", "cpu"])


def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.run(gpu.main, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {gpu.NO_GPU}\n"


def test_stages_are_chosen_by_letter() -> None:
    assert [stage.letter for stage in chosen("b, a")] == ["a", "b"]
    assert sorted(stage.letter for stage in chosen("")) == list("abcdefghijk")
    with pytest.raises(ValueError, match="--stages a,x: there is no stage 'x'"):
        chosen("a,x")
    with pytest.raises(ValueError, match="add --tiny"):
        gpu.main(["--device", "cpu"])


def test_parts_fail_alone_and_stages_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(bench: Bench) -> None:
        with bench.part("first"):
            raise RuntimeError("no\nluck")
        bench.note(second=2)
        raise AssertionError("at last")

    told = {**SETTINGS, "folder": str(tmp_path), "out": str(tmp_path / "out.json"), "seconds": 5}
    monkeypatch.setattr(bench_module, "odd", run, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(told) + "\n"))
    assert work("benchmarks.gpu_stages.bench:odd") == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["second"] == 2
    assert found["failed"] == {"first": "RuntimeError: no luck", "stage": "AssertionError: at last"}
    assert found["frame"]["versions"]["torch"] == torch.__version__


def test_cards_by_name() -> None:
    assert stated_tflops("NVIDIA H100 80GB HBM3") == 989
    assert stated_tflops("NVIDIA H100 PCIe") == 756
    assert stated_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert stated_tflops("Tesla of tomorrow") is None


def test_a_teacher_on_disk_is_left_out_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "nosuchcompiler")
    assert "libaio" in hostings.reason_against("zero3_nvme")
    assert hostings.reason_against("zero3_cpu") == ""


def test_golden_runs_are_held_against_this_machines_cpu_too(tmp_path: Path) -> None:
    golden = json.loads(training.GOLDEN.read_text())
    for case, curve in golden.items():
        for where, more in (("zero1, fp32", 0.0), (training.ON_CPU, 0.5)):
            folder = tmp_path / f"{case}, {where}"
            folder.mkdir()
            steps = [{name: value + more for name, value in zip(curve, row)} for row in zip(*curve.values())]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert max(training.judged(tmp_path / "bd3lm, zero1, fp32", {"_case": "bd3lm"})["apart"].values()) == 0
    for apart in training.beside_this_cpu(tmp_path).values():
        assert all(0 < value <= 0.5 for value in apart.values())
    groups = training.groups_of(tiny=False)
    assert list(groups)[-1] == training.ON_CPU  # asked for last: it is the slowest
    assert len(groups[training.ON_CPU]) == len(groups["golden"])


def toy(folder: Path) -> Bench:
    folder.mkdir()
    return Bench(torch.device("cpu"), True, folder, folder / "out.json", {"bf16_tflops": 1.0, "memory_gbs": 1.0})


def one_process(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages that train or host in this process; imported here, because pytest's own imports no engine."""
    from benchmarks.gpu_stages import full_size

    found = {}
    for name, run in {
        "full size": full_size.run,
        "waits": waits.run,
        "switches": switches.run,
        "hostings": hostings.run,
    }.items():
        bench = toy(folder / name)
        run(bench)
        found[name] = json.loads(bench.out.read_text())
    return found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_of_training_at_toy_size(tmp_path: Path) -> None:
    (found,) = run_on_ranks(one_process, 1, tmp_path, timeout=560)
    assert {name: figures.get("failed") for name, figures in found.items()} == dict.fromkeys(found)
    ours, usual = (
        found["full size"]["tide-cross, micro-batch 2"],
        found["full size"]["the usual way, our experts, micro-batch 1"],
    )
    assert ours["useful_tflop"] > usual["useful_tflop"] > 0
    assert usual["loss"] == pytest.approx(usual["our_loss"], rel=0.02)
    assert set(ours["milliseconds_of_parts"]) > {"teacher", "student_forward", "head_and_loss", "backward", "optimizer"}
    assert found["waits"]["tide-bridge"]["only_the_optimizer_waits"]
    assert {"all on", "compiled layers"} < set(found["switches"])
    assert all(name in found["switches"] for name in [*switches.SWITCHES][::4])
    assert found["hostings"]["zero3_cpu"]["identical"]


@pytest.mark.slow
def test_other_stages_at_toy_size(tmp_path: Path) -> None:
    from benchmarks.gpu_stages import attention

    stages = {
        "a": limits.run,
        "b": attention.run,
        "c": parts.experts,
        "d": parts.head,
        "j": generation.run,
        "k": real.run,
    }
    found = {}
    for name, run in stages.items():
        bench = toy(tmp_path / name)
        run(bench)
        found[name] = bench.figures
    assert {name: figures.get("failed") for name, figures in found.items()} == dict.fromkeys(found)
    assert found["b"]["cases"] == found["b"]["of"] > 0
    assert (found["b"]["wrong"], found["b"]["worst_error"]["value"] > 0) == (0, True)
    assert found["c"]["float32, 16 tokens, all experts"]["error"] < 1e-5
    assert max(found["d"]["24 rows"]["errors"].values()) < 1e-2
    assert found["j"]["student, batch 2"]["tokens_a_second"] > 0
    assert "scores" in found["k"]["commands"]


@pytest.mark.slow
def test_the_command_runs_a_stage_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = [str(launch.REPOSITORY / "benchmarks/gpu.py"), "--tiny", "--device", "cpu", "--stages", "a"]
    done = subprocess.run([sys.executable, *words, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["stages"]["a"]["status"] == "ok"
    assert found["stages"]["a"]["bf16_tflops"] > 0
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.ranks
def test_runs_are_held_against_golden_losses(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(words: list[str], log: Path, on_cpu: bool) -> launch.Rank:
        assert not on_cpu
        launch.forkserver()
        ports = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        process = launch.Rank(target=launch._run, args=(main, words, log, ports))
        process.start()
        return process

    monkeypatch.setattr(training, "start", start)
    monkeypatch.setattr(training, "make_chain", lambda folder: chain)
    bench = toy(tmp_path / "e")
    training.run(bench)
    assert "failed" not in bench.figures
    assert bench.figures["killed_at_work"]
    assert 2 <= bench.figures["steps_before_the_kill"] <= training.STEPS
    for name in ("zero2, fp32", training.KILLED):
        assert max(bench.figures[name]["apart"].values()) < 1e-3
    golden = json.loads(training.GOLDEN.read_text())
    assert set(training.groups_of(tiny=False)["golden"]) == {f"{case}, zero1, fp32" for case in golden}


def test_benchmarks_start_from_the_repository(tmp_path: Path) -> None:
    """As README and CONTRIBUTING say: python -m benchmarks.NAME, from the repository's folder, with nothing set."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    names = sorted(path.stem for path in (launch.REPOSITORY / "benchmarks").glob("[a-z]*.py") if path.stem != "common")
    assert {"gpu", "step", "hosting"} < set(names)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(f'benchmarks.{name}').main"
    subprocess.run([sys.executable, "-c", code, *names], cwd=launch.REPOSITORY, env=environment, check=True)
    by_path = [sys.executable, str(launch.REPOSITORY / "benchmarks/gpu.py"), "--help"]
    told = subprocess.run(by_path, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "--stages" in told.stdout
