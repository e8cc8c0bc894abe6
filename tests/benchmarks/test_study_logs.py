"""benchmarks/study_logs.py: its figures are means and sums of what a study's folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study_logs import main
from megatron_tide.files import read_json


def lines(folder: Path, *rows: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rollouts(folder: Path, own: int, tokens: int, seconds: float, now: int | None = None) -> None:
    folder.mkdir(parents=True)
    written = {"tokens": tokens if now is None else now, "seconds": seconds}
    (folder / "rollouts.json").write_text(json.dumps({"own": own, "tokens": tokens, "now": written}))


def test_means_and_sums_and_a_seed_that_was_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, several in (("seed-1", 0.25), ("seed-2", 0.5)):
        masses = [{"spelled/one_token_mass": 1 - mass, "spelled/several_tokens_mass": mass} for mass in (several, 0.0)]
        lines(tmp_path / seed / "byte-prefix", {"step": 20, **masses[0]}, {"step": 40, **masses[1]})
        rounds = tmp_path / seed / "on-policy"
        lines(rounds / "round-1", {"step": 20, "time/step_s": 0.5}, {"step": 50, "time/step_s": 0.1})
        lines(rounds / "round-2", {"step": 60, "time/step_s": 0.2}, {"step": 100, "time/step_s": 0.3})
    for seed, now in (("seed-1", None), ("seed-2", 3)):
        rollouts(tmp_path / seed / "on-policy" / "round-1-answers", 10, 200, 4.0)
        rollouts(tmp_path / seed / "on-policy" / "round-2-answers", 11, 100, 2.5, now)
    out = tmp_path / "out.json"
    main([str(tmp_path), "--json", str(out)])
    found = read_json(out)
    assert found["spelled"]["seeds"] == {
        "1": {"one_token": 0.875, "several_tokens": 0.125},
        "2": {"one_token": 0.75, "several_tokens": 0.25},
    }
    training = 20 * 0.5 + 30 * 0.1 + 10 * 0.2 + 40 * 0.3
    assert found["rollouts"]["seeds"] == {
        "1": {
            "answers": 21,
            "tokens": 300,
            "rollout_seconds": 6.5,
            "training_seconds": training,
            "rollout_share": round(6.5 / (6.5 + training), 4),
        }
    }
    assert "rollouts" in capsys.readouterr().out


def test_what_is_no_study_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no seed-"):
        main([str(tmp_path)])
    lines(tmp_path / "seed-1" / "byte-prefix", {"step": 20, "loss/total": 1.0})
    with pytest.raises(ValueError, match="no spelled/one_token_mass in metrics"):
        main([str(tmp_path)])
