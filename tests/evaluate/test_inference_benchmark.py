"""Memory and speed: what is counted, each model apart, and every way in which measuring fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_tide import cli, machine
from megatron_tide.evaluate import inference_benchmark as module
from megatron_tide.evaluate.inference_benchmark import InferenceBenchmark, Measured, read_inference_benchmark
from tests.conftest import NEW_TOKENS
from tests.support.commands import command
from tests.support.launch import REPOSITORY

pytestmark = pytest.mark.slow  # starts processes that import torch and load models

benchmark = command("inference-benchmark")
SMALL = ("float32", "cpu", "Add.", 3, 2)


def weights_of(folder):
    """(parameters, bytes) of a hub-format folder in fp32, counted in its file."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys() if "expert_bias" not in name)  # noqa: SIM118
    return count, 4 * count


def test_what_was_measured(inference, chain):
    found = read_inference_benchmark(inference)
    assert (found.student.model_type, found.teacher.model_type) == ("a2d-qwen3", "llada2_moe")
    for name in ("student", "teacher"):
        measured = getattr(found, name)
        assert (measured.parameters, measured.weights_bytes) == weights_of(chain.root / name)
    student = found.student
    assert student.tokens == NEW_TOKENS == found.settings["new_tokens"]
    assert student.passes >= NEW_TOKENS
    assert len(student.seconds) == 2
    assert student.tokens_per_s == pytest.approx(NEW_TOKENS / (sum(student.seconds) / 2))
    assert student.weights_bytes < student.memory_bytes < student.process_bytes
    assert found.machine["cpu"]
    assert found.versions["torch"]
    ratios = json.loads(inference.read_text())["ratios"]
    assert ratios["weights"] == found.teacher.weights_bytes / student.weights_bytes


def test_the_teacher_answers_too(inference):
    found = read_inference_benchmark(inference)
    assert found.teacher.cannot == ""
    assert found.teacher.tokens == NEW_TOKENS
    assert found.teacher.weights_bytes < found.teacher.memory_bytes < found.teacher.process_bytes
    ratios = found.ratios()
    assert ratios["memory"] == found.teacher.memory_bytes / found.student.memory_bytes
    assert ratios["seconds"] == sum(found.teacher.seconds) / sum(found.student.seconds)


def measured(**changes):
    plain = {"model_type": "a2d-qwen3", "parameters": 10, "weights_bytes": 40, "block_size": 4, "prompt_tokens": 3}
    answered = {"memory_of": "the peak", "memory_bytes": 100, "process_bytes": 900, "tokens": 8, "passes": 8}
    return Measured(**{"path": "m", **plain, **answered, "seconds": (2.0, 1.0, 4.0), **changes})


def compared(student, teacher):
    return InferenceBenchmark(student=student, teacher=teacher, settings={}, machine={}, versions={}, date="2026-01-02")


def test_ratios_are_the_teacher_over_the_student(tmp_path):
    teacher = measured(parameters=50, weights_bytes=200, memory_bytes=2200, seconds=(10.0, 11.0, 9.0))
    found = compared(measured(), teacher)
    assert found.ratios() == {"weights": 5.0, "memory": 22.0, "seconds": 5.0}
    assert found.summary()[-1] == "teacher / student: weights 5.00, memory 22.00, seconds 5.00"
    found.write(tmp_path / "found.json")
    assert read_inference_benchmark(tmp_path / "found.json").ratios() == found.ratios()
    (tmp_path / "other.json").write_text('{"student": {}}')
    with pytest.raises(ValueError, match=r"other\.json: not what python -m megatron_tide inference-benchmark writes"):
        read_inference_benchmark(tmp_path / "other.json")


def test_a_model_that_cannot_answer_says_why():
    mute = measured(cannot="no blocks <here>", memory_bytes=0, seconds=(), tokens=0)
    found = compared(measured(), mute)
    assert found.ratios() == {"weights": 1.0}
    assert found.summary()[1].endswith("not measured further: no blocks <here>")


def test_measuring_here(chain):
    found = module.measure(str(chain.root / "student"), *SMALL)
    assert found.cannot == ""
    assert (found.tokens, len(found.seconds)) == (3, 2)
    assert "while answering, less" in found.memory_of


def test_a_model_whose_mask_nobody_names_is_told(chain, tmp_path):
    folder = Path(shutil.copytree(chain.root / "student", tmp_path / "student"))
    named = json.loads((folder / "tokenizer_config.json").read_text())["mask_token"]
    mask = "<|of its own|>"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / file).read_text().replace(named, mask)
        (folder / file).write_text(content.replace(f'"mask_token": "{mask}"', '"unused": ""'))
    found = module.measure(str(folder), *SMALL)
    assert "has no mask token" in found.cannot
    assert (found.seconds, found.tokens, found.memory_bytes) == ((), 0, 0)
    assert found.weights_bytes > 0
    assert module.measure(str(folder), *SMALL, mask=mask).tokens == 3
    out = tmp_path / "found.json"
    pair = ["--student", str(folder), "--teacher", str(folder), "--teacher-mask", mask, "--out", str(out)]
    benchmark([*pair, "--dtype", "float32", "--new-tokens", "2", "--repeats", "1"])
    assert "has no mask token" in read_inference_benchmark(out).student.cannot
    assert read_inference_benchmark(out).teacher.tokens == 2


def test_where_the_peak_cannot_be_reset_loading_counts_too(chain, monkeypatch):
    def refused() -> None:
        raise PermissionError("no clear_refs here")

    monkeypatch.setattr(module, "reset_peak", refused)
    found = module.measure(str(chain.root / "student"), *SMALL)
    assert found.memory_of.startswith("peak resident memory while loading and answering, less what the process held")


def test_on_a_gpu_the_peak_is_what_was_allocated_there(monkeypatch):
    held = {"cuda:1": 500}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", held.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update({device: 30}))
    meter = module.GpuMemory("cuda:1")
    meter.start()
    assert meter.peak() == 30


def test_the_peak_of_a_process_starts_again():
    held = bytearray(200_000_000)
    peak = machine.rss_bytes("VmHWM")
    del held
    machine.reset_peak()
    assert machine.rss_bytes("VmHWM") < peak - 100_000_000
    assert machine.rss_bytes() > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--student", "./nowhere"], "./nowhere: no such folder"),
        (["--repeats", "0"], "error: --repeats 0: must be at least 1"),
        (["--new-tokens", "0"], "error: --new-tokens 0: must be between 1 and 16777216"),
        (["--out", "nowhere/found.json"], "--out nowhere/found.json: no such folder nowhere"),
    ],
)
def test_mistakes_are_one_line(chain, tmp_path, capfd, flags, said):
    student, teacher = (str(chain.root / name) for name in ("student", "teacher"))
    plain = ["--student", student, "--teacher", teacher, "--out", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit) as ended:
        cli.run(benchmark, [*plain, *flags])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "found.json").exists()


def die(path: str, mask: None) -> None:
    os._exit(9)


def test_a_process_that_dies_without_a_word(monkeypatch):
    monkeypatch.setattr(module, "measure", die)
    with pytest.raises(ValueError, match="mine: the process that measured it died"):
        module.measure_apart("mine", {}, None)


def test_a_model_is_found_from_any_folder(chain, tmp_path):
    """The fresh process finds the package as this one does, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"dtype": "float32", "device": "cpu", "prompt": "Add.", "new_tokens": 2, "repeats": 1}
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from megatron_tide.evaluate.inference_benchmark import measure_apart\n"
        f"print(measure_apart({str(chain.root / 'student')!r}, {settings!r}, None).tokens)"
    )
    line = [sys.executable, "-c", code]
    finished = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert finished.stdout == "2\n", finished.stderr
