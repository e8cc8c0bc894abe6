"""What a folder holds, what it lacks, and what is corrupt."""

from __future__ import annotations

import json

import pytest

from megatron_tide.report.page import build_page
from megatron_tide.report.run_folder import BITS, at_end, at_start, read_run, read_runs

pytestmark = pytest.mark.slow  # a recipe's folder is made first: two training runs, scores, an inference benchmark

TRAINED = {"step": 1, "loss/denoise": 3.0}


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def test_a_recipe_folder(recipe):
    run = read_run(recipe, "mine")
    assert [training.label for training in run.trainings] == ["baseline", "bridged"]
    baseline, bridged = run.trainings
    assert (baseline.has_teacher, bridged.has_teacher) == (False, True)
    assert ["tidal_axes" in training.strategy for training in run.trainings] == [False, True]
    assert (baseline.base_model, baseline.data) == (bridged.base_model, bridged.data)
    assert bridged.last_step == 8
    logged = [json.loads(line) for line in (recipe / "bridged" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/total"] for row in logged if "loss/total" in row]
    total = bridged.curve("loss/total")
    assert total.to_dict() == dict(zip(range(1, 9), losses))
    assert at_end(total) == pytest.approx(sum(losses[-2:]) / 2)
    assert at_start(total) == pytest.approx(sum(losses[:2]) / 2)
    assert bridged.curve("validation/bits_per_byte").index.tolist() == [4, 8]
    recorded = json.loads((recipe / "scores.json").read_text())["models"]
    assert run.scores.models["name"].tolist() == ["start", "baseline", "bridged", "teacher"]
    assert run.scores.models["minus.low"][2] == recorded[2]["minus"]["start"]["low"]
    assert run.stages["name"].tolist() == ["a-first", "bridge", "sample"]
    assert len(run.completions) == 2
    assert [len(one["answers"]) for one in run.scores.completions] == [4] * 4
    assert run.notes == {}


def test_the_teacher_probabilities_of_a_window_are_all_somewhere(recipe):
    bridged = read_run(recipe, "mine").trainings[1]
    shares = bridged.by_bin("chunk/teacher_probability")
    assert list(shares) == pytest.approx([number / 10 for number in range(10)])
    assert shares.shape == (8, 10)
    assert shares.sum(axis=1).tolist() == pytest.approx([1] * 8)
    means = bridged.by_bin("chunk/student_probability")
    assert set(means) <= set(shares)
    for low in means:
        assert any(shares[low])


def test_a_training_run_by_itself_says_what_is_not_there(recipe):
    run = read_run(recipe / "bridged", "bridged")
    assert [training.folder for training in run.trainings] == [recipe / "bridged"]
    assert run.notes == {
        "scores": ["no scores.json here: python -m megatron_tide evaluate writes it"],
        "completions": ["no completions.jsonl here: python -m megatron_tide generate --json writes it"],
        "inference": ["no inference_benchmark.json here: python -m megatron_tide inference-benchmark writes it"],
    }


def test_scores_alone_are_enough(recipe, tmp_path):
    (tmp_path / "scores.json").write_text((recipe / "scores.json").read_text())
    run = read_run(tmp_path, "mine")
    assert len(run.scores.models) == 4
    assert run.notes["runs"] == ["no metrics.jsonl here or one folder below: python -m megatron_tide distill writes it"]


def test_scores_of_a_version_without_intervals_by_timestep(own_copy):
    scores = json.loads((own_copy / "scores.json").read_text())
    for row in scores["models"][0]["by_timestep"]:
        del row["bits_per_masked_token_low"], row["bits_per_masked_token_high"]
    (own_copy / "scores.json").write_text(json.dumps(scores))
    first, second = read_run(own_copy, "mine").scores.by_timestep[:2]
    assert (first[f"{BITS}_low"] == first[BITS]).all()
    assert (first[f"{BITS}_high"] == first[BITS]).all()
    assert ((second[f"{BITS}_low"] < second[BITS]) & (second[BITS] < second[f"{BITS}_high"])).any()


def test_scores_of_a_version_without_a_choice_of_noise(recipe, own_copy):
    """They can be compared with one timestep per sample."""
    path = own_copy / "scores.json"
    scores = json.loads(path.read_text())
    assert scores["settings"].pop("likelihood_noise") == "sample"
    path.write_text(json.dumps(scores))
    assert read_run(own_copy, "old").scores.settings == read_run(recipe, "new").scores.settings


def test_benchmarks_alone_are_scores_too(tmp_path):
    score = {
        "metric": "pass@1",
        "filter": "none",
        "n": 164,
        "value": 0.25,
        "low": 0.1875,
        "high": 0.3125,
        "published": None,
    }
    asked = {"model": "distilled", "benchmark": "humaneval", "scores": [score]}
    (tmp_path / "scores.json").write_text(json.dumps({"benchmarks": [asked]}))
    scores = read_run(tmp_path, "mine").scores
    assert scores.models.empty
    cells = ["distilled", "humaneval", "pass@1", "164", "0.250 [0.188, 0.312]"]
    assert scores.benchmarks == [cells]
    page = build_page(read_runs([tmp_path]))
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "<figure" not in page


def test_what_a_killed_run_left_behind_is_passed_over(tmp_path):
    rows = [TRAINED, {"step": 2, "loss/denoise": float("nan")}, {"loss/denoise": 1.0}, ["odd"], '{"step": 3, "loss/den']
    lines(tmp_path / "run" / "metrics.jsonl", *rows)
    lines(tmp_path / "other" / "metrics.jsonl", "")
    (training,) = read_run(tmp_path, "mine").trainings
    assert training.metrics.to_dict() == {"loss/denoise": {1: 3.0}}
    assert training.strategy == {}


def test_a_line_separator_in_an_answer_is_no_end_of_line(tmp_path):
    lines(tmp_path / "metrics.jsonl", TRAINED)
    row = {"prompt": "a\u2028b", "answer": "c", "finished": True, "reference": None}
    (tmp_path / "completions.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert [one["prompt"] for one in read_run(tmp_path, "mine").completions] == ["a\u2028b"]


@pytest.mark.parametrize(
    ("file", "content", "part", "said"),
    [
        ("scores.json", "{", "scores", "scores.json: not valid JSON"),
        ("scores.json", "[]", "scores", "contains a JSON list, not an object"),
        ("scores.json", '{"models": [{"name": "a"}]}', "scores", "scores.json: not what python -m megatron_tide evalu"),
        ("scores.json", '{"pages": 3}', "scores", "scores.json: holds no score"),
        ("completions.jsonl", '{"prompt": "a"}\n', "completions", "megatron_tide generate --json writes (no 'answer')"),
        ("inference_benchmark.json", '{"student": {}}', "inference", "megatron_tide inference-benchmark writes"),
    ],
)
def test_damage_is_named_and_stops_nothing(tmp_path, file, content, part, said):
    lines(tmp_path / "metrics.jsonl", TRAINED)
    (tmp_path / file).write_text(content)
    run = read_run(tmp_path, "mine")
    assert said in run.notes[part][0]
    assert len(run.trainings) == 1


def test_lines_that_each_have_other_names_are_not_made_into_a_table(tmp_path):
    """A file of some megabytes would need terabytes: every line has a column for every name."""
    names = [{"step": step, **{f"{step}/{number}": 1.0 for number in range(300)}} for step in range(1500)]
    lines(tmp_path / "other" / "metrics.jsonl", *names)
    lines(tmp_path / "run" / "metrics.jsonl", TRAINED)
    run = read_run(tmp_path, "mine")
    assert [training.label for training in run.trainings] == ["run"]
    assert run.notes["runs"][0] == "other/metrics.jsonl: 1500 lines with 450001 names in all, which no run has"


def test_several_runs_are_told_apart(tmp_path):
    for name in ("a/quick", "b/quick", "c/other"):
        lines(tmp_path / name / "bd3lm" / "metrics.jsonl", TRAINED)
    lines(tmp_path / "alone" / "metrics.jsonl", TRAINED)
    folders = [tmp_path / name for name in ("a/quick", "b/quick", "c/other", "alone")]
    labels = [training.label for run in read_runs(folders) for training in run.trainings]
    assert labels == [f"{tmp_path}/a/quick/bd3lm", f"{tmp_path}/b/quick/bd3lm", "other/bd3lm", "alone"]
    assert [training.label for run in read_runs(folders[:1]) for training in run.trainings] == ["bd3lm"]


def test_nothing_to_show_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder; give a recipe's folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"nothing to report: no metrics.jsonl here or one folder below"):
        read_runs([tmp_path])
    lines(tmp_path / "metrics.jsonl", TRAINED)
    with pytest.raises(ValueError, match=r"given twice; name each run once"):
        read_runs([tmp_path, tmp_path / ".." / tmp_path.name])
