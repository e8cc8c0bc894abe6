"""Measured scores in the model card: written once, replaced when measured again, the rest of the card untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tide.release import Score, card_scores, write_scores

CARD = """---
license: apache-2.0
---

# student

## Scores

Not measured yet.

## Parity with the training weights

| | |
|---|---|
| rows | 3 |

## Limits
"""


def score(task: str, value: float, how: str = "greedy") -> Score:
    return Score(task=task, metric="pass@1", value=value, low=value - 0.1, high=value + 0.1, count=164, how=how)


def test_scores_stand_once_and_the_rest_stays(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(CARD)
    write_scores(tmp_path, [score("humaneval", 0.25), score("mbpp", 0.5, "a | b")])
    assert "| humaneval | pass@1 | 0.25 | 0.15 to 0.35 | 164 | greedy |" in card.read_text()
    assert "| mbpp | pass@1 | 0.5 | 0.4 to 0.6 | 164 | a \\| b |" in card.read_text()
    write_scores(tmp_path, [score("humaneval", 0.75)])
    text = card.read_text()
    assert text.count("## Scores") == 1
    assert text.count("| humaneval |") == 1
    assert "| humaneval | pass@1 | 0.75 |" in text
    assert "| mbpp | pass@1 | 0.5 |" in text
    before, after = CARD.split("## Scores\n\nNot measured yet.\n\n")
    front, index, rest = text.partition("model-index:\n")
    assert (front + rest[rest.index("---\n") :]).startswith(before)
    assert index
    assert 'name: "humaneval"' in rest.partition("---\n")[0]
    assert text.endswith(after)


def test_a_score_is_one_row_whatever_its_task_is_called(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    for value in (0.25, 0.75):
        write_scores(tmp_path, [score("my|task\n\n## Limits\r<img src=x>", value)])
    text = (tmp_path / "README.md").read_text()
    assert text.count("my\\|task ## Limits &lt;img src=x>") == 1
    assert text.count("\n## Limits\n") == 1


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model card to write scores into"):
        write_scores(tmp_path, [score("mbpp", 0.5)])
    (tmp_path / "README.md").write_text("# something else\n")
    with pytest.raises(ValueError, match="no model card to write scores into"):
        write_scores(tmp_path, [score("mbpp", 0.5)])


def test_the_record_of_an_evaluation_becomes_rows() -> None:
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    record = {
        "data": {"folder": "runs/x/test-data"},
        "settings": {"mc_samples": 8, "likelihood_noise": "block", "seed": 0, "dtype": "float32"},
        "models": [
            {"path": path, "samples": 9, "bits_per_byte": estimate, "masked_token_accuracy": estimate}
            for path in ("hf", "other")
        ],
        "benchmarks": [
            {
                "path": "hf",
                "benchmark": "gsm8k",
                "preset": {"task": "gsm8k_cot", "few_shot": 0, "new_tokens": 256, "steps": 128, "temperature": 0.0},
                "settings": {"block_layout": "answer"},
                "scores": [{"metric": "exact_match", "filter": "strict", "n": 7, **estimate}],
            }
        ],
    }
    bits, accuracy, exact = card_scores(record, "hf")
    assert (bits.task, bits.metric, bits.value, bits.count) == ("held-out text (test-data)", "bits per byte", 0.5, 9)
    assert bits.how == "diffusion bound, 8 timesteps per block, seed 0, float32"
    assert accuracy.metric == "masked token accuracy"
    assert (exact.metric, exact.low, exact.high) == ("exact_match strict, %", 25.0, 75.0)
    assert exact.how == "gsm8k_cot, 0 shots, 256 tokens in 128 passes, temperature 0, blocks begin at the answer"
    record["benchmarks"][0]["settings"] = {"block_layout": "sequence"}  # type: ignore[index]
    assert card_scores(record, "hf")[-1].how.endswith("blocks begin at the start of the text")
    assert card_scores(record, "nowhere") == []
