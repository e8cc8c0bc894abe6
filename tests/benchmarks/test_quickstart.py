"""Figures of several quickstarts: what they count, and that earlier figures count with new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import quickstart
from megatron_tide.files import read_json


def finished(folder: Path, seed: int, high: float, said: int) -> Path:
    """A run's folder: the end of tide-bridge's interval, its completions, beside 5 of bd3lm and 9 of bd3lm-short."""
    difference = {"value": high - 0.1, "low": high - 0.2, "high": high}
    names = {"start": 1, "bd3lm": 5, "bd3lm-short": 9, "tide-bridge": said}
    scores: dict[str, Any] = {
        name: {
            "samples": 4,
            "bits_per_byte": {"value": 2.0},
            "minus": dict.fromkeys(quickstart.BASELINES, difference),
            "completions": {"both": both, "count": 10},
        }
        for name, both in names.items()
    }
    folder.mkdir()
    report = {"seed": seed, "seconds": 120, "peak_process_bytes": 1, "machine": {"cpu": "c"}, "scores": scores}
    (folder / "report.json").write_text(json.dumps({**report, "versions": {"python": "3.13.0"}}))
    return folder


def test_earlier_figures_count_with_new_ones(tmp_path: Path) -> None:
    first, both = tmp_path / "first.json", tmp_path / "both.json"
    quickstart.main([str(finished(tmp_path / "a", 1, -0.1, 10)), "--json", str(first)])
    quickstart.main([str(finished(tmp_path / "b", 2, 0.1, 9)), "--with", str(first), "--json", str(both)])
    found = read_json(both)
    assert [run["seed"] for run in found["runs"]] == [1, 2]
    assert found["runs"][:1] == read_json(first)["runs"]
    assert found["number of runs"] == 2
    assert found["tide-bridge below bd3lm, runs"] == 1  # the second interval holds zero
    assert found["more completions than denoising only, runs"] == 1  # nine are not more than nine
    assert found["runs"][1]["minutes"] == 2
