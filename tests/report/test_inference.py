"""The section on memory and speed: settings, ratios, and models that cannot answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_tide.evaluate.inference_benchmark import InferenceBenchmark, Measured
from megatron_tide.report.inference import size
from megatron_tide.report.page import build_page
from megatron_tide.report.run_folder import INFERENCE, read_runs

STUDENT = Measured(
    path="m",
    model_type="a2d-qwen3",
    parameters=10,
    weights_bytes=40,
    block_size=4,
    prompt_tokens=3,
    memory_of="the peak",
    memory_bytes=100,
    process_bytes=900,
    tokens=8,
    passes=8,
    seconds=(2.0, 1.0, 4.0),
)
TEACHER = replace(STUDENT, parameters=50, weights_bytes=200, memory_bytes=2200, seconds=(10.0, 11.0, 9.0))
MUTE = replace(STUDENT, cannot="no blocks <here>", memory_bytes=0, seconds=(), tokens=0)


def shown(tmp_path, student=STUDENT, teacher=TEACHER, device="cpu"):
    found = InferenceBenchmark(
        student=student,
        teacher=teacher,
        settings={"new_tokens": 8, "dtype": "float32", "device": device, "repeats": 3},
        machine={"cpu": "a processor", "cores": 2, "accelerators": ["a GPU"]},
        versions={},
        date="2026-01-02",
    )
    found.write(tmp_path / INFERENCE)
    return build_page(read_runs([tmp_path]))


def test_ratios_are_the_teacher_over_the_student(tmp_path):
    html = shown(tmp_path)
    cells = ("teacher / student", "5.0 times", "5.0 times", "22.0 times", "5.0 times")
    assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}" in html
    assert "8 new tokens after one prompt, batch 1, one token per pass, float32 on cpu (a processor, 2 cores)" in html
    assert (
        "Memory: the peak. Peak of the whole process, libraries included: 0.9 kB (student) and 0.9 kB (teacher)."
        in html
    )


def test_a_model_that_cannot_answer_says_why(tmp_path):
    html = shown(tmp_path, teacher=MUTE)
    assert 'colspan="4">not measured: no blocks &lt;here&gt;</td>' in html
    assert "libraries included: 0.9 kB (student)." in html
    assert "Neither model answers here." in shown(tmp_path, student=MUTE, teacher=MUTE)


def test_a_gpu_is_named_where_it_was_used(tmp_path):
    assert "float32 on cuda (a GPU, 2 cores)" in shown(tmp_path, device="cuda")


@pytest.mark.parametrize(("count", "text"), [(999, "1.0 kB"), (2_500_000, "2.5 MB"), (31_300_000_000, "31.3 GB")])
def test_sizes_are_in_powers_of_a_thousand(count, text):
    assert size(count) == text
