"""The held-out bound against the plain one, on both sides, and what makes its rows comparable."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.diffusion import MASKINGS, noise
from megatron_tide.evaluate import evaluate_likelihood, scoring_inputs, validate
from megatron_tide.evaluate.bootstrap import mean, ratio
from megatron_tide.evaluate.likelihood import VALIDATION_MC_SAMPLES, masked_tokens, measure, spread
from megatron_tide.evaluate.likelihood_noise import PER_BLOCK, PER_SAMPLE, SCHEDULE, block_grid, timestep_grid
from megatron_tide.models import load_model
from tests.reference.likelihood import likelihood as plain
from tests.reference.likelihood import likelihood_by_block
from tests.support.commands import command
from tests.support.lab import Lab


@pytest.fixture(scope="module")
def data(lab: Lab) -> PreparedData:
    return PreparedData.open(lab.data)


@pytest.fixture(scope="module")
def models(lab: Lab) -> dict[str, Any]:
    return {"student": load_model(lab.student), "teacher": load_model(lab.teacher)}


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_equals_the_plain_way(models: dict[str, Any], data: PreparedData, name: str) -> None:
    def grid(key: int) -> list[float]:
        return timestep_grid(torch.tensor([key]), 3, seed=4)[0].tolist()

    expected = plain(models[name], data, name, mc_samples=3, seed=4, grid=grid)
    report = evaluate_likelihood(
        models[name], data, scoring_inputs(data, name), mc_samples=3, seed=4, batch_size=5, slice_rows=7
    )
    assert report.bits_per_byte.value == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert report.accuracy.value == pytest.approx(expected["accuracy"], rel=1e-9)
    assert report.bits_per_byte.low < report.bits_per_byte.value < report.bits_per_byte.high


def test_copies_of_a_model_share_the_samples(lab: Lab, models: dict[str, Any], data: PreparedData) -> None:
    """Whatever their number, the numbers are the same bit for bit."""
    copies = [load_model(lab.student) for _ in range(2)]
    used: list[int] = []
    for place, model in enumerate(copies):
        plain = model.backbone
        model.backbone = lambda *given, plain=plain, place=place, **more: used.append(place) or plain(*given, **more)
    how: dict[str, Any] = {"mc_samples": 2, "seed": 4, "batch_size": 3}
    scoring = scoring_inputs(data, "student")
    alone = evaluate_likelihood(models["student"], data, scoring, **how)
    for number in (1, 2):
        found = evaluate_likelihood(models["student"], data, scoring, copies=copies[:number], **how)
        assert found.to_dict() == alone.to_dict()
        assert found.nats.tolist() == alone.nats.tolist()
    assert set(used) == {0, 1}


@pytest.mark.parametrize("name", ["student", "teacher", "alone"])
def test_blocks_that_begin_at_the_answer_equal_the_plain_way(lab: Lab, models: dict[str, Any], name: str) -> None:
    """With the masks of the other layout, token for token."""
    data = PreparedData.open(lab.student_data if name == "alone" else lab.data)
    name = "student" if name == "alone" else name
    how: dict[str, Any] = {"mc_samples": 3, "seed": 4}
    expected = plain(
        models[name],
        data,
        name,
        **how,
        grid=lambda key: timestep_grid(torch.tensor([key]), 3, seed=4)[0].tolist(),
        from_answer=True,
    )
    side = scoring_inputs(data, name, at_answer=True)
    report = evaluate_likelihood(models[name], data, side, **how, batch_size=5)
    assert report.bits_per_byte.value == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert report.accuracy.value == pytest.approx(expected["accuracy"], rel=1e-9)
    sequence = evaluate_likelihood(models[name], data, scoring_inputs(data, name), **how, batch_size=5)
    assert report.bits_per_byte.value != sequence.bits_per_byte.value
    assert [row["masked_tokens"] for row in report.by_timestep] == [
        row["masked_tokens"] for row in sequence.by_timestep
    ]
    per_block = evaluate_likelihood(models[name], data, side, **how, noise=PER_BLOCK)
    assert per_block.bits_per_byte.value == pytest.approx(report.bits_per_byte.value, rel=0.05)


@pytest.mark.parametrize("name", ["student", "teacher", "alone"])
def test_timesteps_per_block_equal_the_plain_way(lab: Lab, models: dict[str, Any], name: str) -> None:
    """On both sides' own blocks, and on data without chunks."""
    data = PreparedData.open(lab.student_data if name == "alone" else lab.data)
    name = "student" if name == "alone" else name
    expected = likelihood_by_block(models[name], data, name, mc_samples=3, seed=4)
    scoring, how = scoring_inputs(data, name), {"mc_samples": 3, "seed": 4, "noise": PER_BLOCK}
    report = evaluate_likelihood(models[name], data, scoring, batch_size=5, **how)
    assert report.bits_per_byte.value == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert report.accuracy.value == pytest.approx(expected["accuracy"], rel=1e-9)
    assert report.to_dict()["noise"] == "block"
    assert sum(row["masked_tokens"] for row in report.by_timestep) > 0
    alone = evaluate_likelihood(models[name], data, scoring, batch_size=1, **how)
    assert np.allclose(report.nats, alone.nats, rtol=1e-5)


class Uniform(torch.nn.Module):
    """Every token is as likely as every other."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.head_weight = torch.nn.Parameter(torch.zeros(vocabulary, 4))

    def backbone(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        return torch.ones(*input_ids.shape, 4)


class Contextual(Uniform):
    """Certain of nothing where much of what it sees is masked, and fairly certain where little is."""

    def __init__(self, vocabulary: int, mask_id: int) -> None:
        super().__init__(vocabulary)
        self.mask_id = mask_id
        self.head_weight = torch.nn.Parameter(torch.randn(vocabulary, 4, generator=torch.Generator().manual_seed(0)))

    def backbone(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        sees = attention_mask[:, 0].float()
        masked = (sees @ (input_ids == self.mask_id).float()[..., None])[..., 0]
        return ((1 + masked) ** 1.5)[..., None] * torch.ones(4)


@pytest.mark.parametrize("name", ["student", "teacher", "alone"])
def test_timesteps_per_block_have_the_same_mean_and_less_variance(lab: Lab, name: str) -> None:
    """Over many seeds, of a model whose loss depends on what else is masked."""
    data = PreparedData.open(lab.student_data if name == "alone" else lab.data)
    scoring = scoring_inputs(data, "student" if name == "alone" else name)
    model, seeds = Contextual(512, scoring.mask_id), range(60)
    how: dict[str, Any] = {"mc_samples": 2, "batch_size": 24, "slice_rows": None, "label": ""}
    bounds = {}
    for noise_of in (PER_SAMPLE, PER_BLOCK):
        sums = [measure(model, data, scoring, spread(24, 0), noise=noise_of, seed=s, **how) for s in seeds]
        bounds[noise_of.name] = np.array([one.bound().sum() for one in sums])
    error = math.sqrt(sum(values.var(ddof=1) / len(seeds) for values in bounds.values()))
    assert abs(bounds["block"].mean() - bounds["sample"].mean()) < 4 * error
    assert error < 0.03 * bounds["sample"].mean(), "a bias could hide behind this"
    assert bounds["block"].var() < bounds["sample"].var() / 3


def test_student_only_data_scores_all_of_the_response(lab: Lab, models: dict[str, Any]) -> None:
    alone = PreparedData.open(lab.student_data)
    expected = plain(
        models["student"],
        alone,
        "student",
        mc_samples=2,
        seed=0,
        grid=lambda key: timestep_grid(torch.tensor([key]), 2, 0)[0],
    )
    report = evaluate_likelihood(models["student"], alone, scoring_inputs(alone, "student"), mc_samples=2, seed=0)
    assert report.bits_per_byte.value == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    with pytest.raises(ValueError, match="without a teacher"):
        scoring_inputs(alone, "teacher")


def test_text_that_the_tokenizer_changed_is_told_with_the_scores(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = shutil.copytree(lab.student, tmp_path / "lower"), tmp_path / "data"
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": {"type": "Lowercase"}}))
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": said}] for said in ("two", "Two", "b")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    for student, changed in ((folder, 1), (lab.student, 0)):
        flags = ["--data", str(tmp_path / "rows.jsonl"), "--student", str(student), "--workers", "1"]
        command("prepare")([*flags, "--student-length", "64", "--student-block", "8", "--out", str(out)])
        assert PreparedData.open(out).changed("student") == changed
        assert ("the student's tokenizer changes the text of 1 rows" in capsys.readouterr().err) == bool(changed)
        command("evaluate")(["--data", str(out), "--student", f"a={student}", "--mc-samples", "1"])
        assert ("note: a's tokenizer changes the text of 1 of 3" in capsys.readouterr().err) == bool(changed)
        shutil.rmtree(out)


def test_both_sides_guess_the_same_chunks(data: PreparedData) -> None:
    student, teacher = scoring_inputs(data, "student"), scoring_inputs(data, "teacher")
    batch = read_batch(data, range(len(data)))
    for k in range(3):
        drawn = noise(batch, seed=1, epoch=k, masking=MASKINGS["synchronous"], t=torch.full((len(data),), 0.4))
        chunks = []
        for side in (student, teacher):
            found, tokens = masked_tokens(side, batch, drawn), side.tokens(batch)
            scored = {(int(s), int(g)) for s, g in zip(drawn.level_sample[found.level_M], found.targets_M)}
            assert scored  # gold tokens differ by side; chunks are compared below
            position = torch.arange(tokens.ids.shape[1])
            counted = side.masked(drawn) & (tokens.chunk >= 0) & (position <= tokens.content_end[:, None])
            assert int(counted.sum()) == len(found.targets_M)
            chunks.append({(s, c) for s, c in zip(counted.nonzero()[:, 0].tolist(), tokens.chunk[counted].tolist())})
        assert chunks[0] == chunks[1]


def test_fill_behind_the_end_is_masked_but_not_scored(data: PreparedData) -> None:
    side = scoring_inputs(data, "teacher")
    batch = read_batch(data, range(len(data)))
    drawn = noise(batch, seed=0, epoch=0, masking=MASKINGS["synchronous"], t=torch.ones(len(data)))
    found = masked_tokens(side, batch, drawn)
    eos = data.manifest["teacher"]["eos_id"]
    whole = [i for i in range(len(data)) if data.sample(i).teacher.ids[-1] == eos]
    fills = [i for i in whole if len(data.sample(i).teacher.ids) > data.sample(i).teacher.content_end + 1]
    assert fills
    for i in fills:
        assert int((found.targets_M[drawn.level_sample[found.level_M] == i] == eos).sum()) == 1
        assert bool(drawn.teacher_masked[i, int(batch.teacher.content_end[i]) + 1])


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_uniform_model_costs_log_v_a_token(data: PreparedData, name: str) -> None:
    vocabulary, mc_samples = 512, 6
    report = evaluate_likelihood(Uniform(vocabulary), data, scoring_inputs(data, name), mc_samples=mc_samples, seed=3)
    per_sample = np.zeros(len(data))
    batch = read_batch(data, range(len(data)))
    grid = timestep_grid(batch.keys, mc_samples, 3)
    for k in range(mc_samples):
        drawn = noise(batch, seed=3, epoch=k, masking=MASKINGS["synchronous"], t=grid[:, k])
        found = masked_tokens(scoring_inputs(data, name), batch, drawn)
        counts = torch.bincount(drawn.level_sample[found.level_M], minlength=len(data))
        per_sample += (counts.double() / grid[:, k] / mc_samples).numpy()
    size = sum(data.sample(i).response_bytes for i in range(len(data)))
    assert report.bits_per_byte.value == pytest.approx(per_sample.sum() * math.log2(vocabulary) / size, rel=1e-6)


def test_the_bound_of_a_uniform_model_is_unbiased(data: PreparedData) -> None:
    """Many timesteps: log2(V) bits for each scored token, whatever was masked when."""
    report = evaluate_likelihood(
        Uniform(512), data, scoring_inputs(data, "student"), mc_samples=400, seed=0, batch_size=24
    )
    tokens = sum(int((data.sample(i).student.chunk >= 0).sum()) for i in range(len(data)))
    size = sum(data.sample(i).response_bytes for i in range(len(data)))
    assert report.bits_per_byte.value == pytest.approx(tokens * 9.0 / size, rel=0.03)


def test_grid_is_stratified_and_belongs_to_the_sample() -> None:
    keys = torch.tensor([5, 9, 5])
    grid = timestep_grid(keys, 4, seed=0)
    assert torch.equal(grid[0], grid[2])
    assert not torch.equal(grid[0], grid[1])
    eps = SCHEDULE.eps
    assert torch.equal(((grid - eps) / (1 - eps) * 4).floor(), torch.arange(4.0, dtype=torch.float64).expand(3, 4))
    assert not torch.equal(grid, timestep_grid(keys, 4, seed=1))


def test_grid_of_blocks_is_stratified_and_belongs_to_the_sample() -> None:
    keys = torch.tensor([5, 9, 5])
    grid = block_grid(keys, 6, 4, seed=0)
    assert torch.equal(grid[:, 0], grid[:, 2])
    assert not torch.equal(grid[:, 0], grid[:, 1])
    assert torch.equal((grid * 4).floor().sort(0).values[:, 0], torch.arange(4.0).double()[:, None].expand(4, 6))
    assert (grid[1, 0] * 4).long().tolist() == [1, 2, 3, 0, 1, 2]
    assert torch.equal(block_grid(keys, 3, 4, seed=0), grid[..., :3])
    assert not torch.equal(grid, block_grid(keys, 6, 4, seed=1))


def test_result_does_not_depend_on_batches(models: dict[str, Any], data: PreparedData) -> None:
    one = evaluate_likelihood(models["student"], data, scoring_inputs(data, "student"), mc_samples=2, batch_size=1)
    many = evaluate_likelihood(models["student"], data, scoring_inputs(data, "student"), mc_samples=2, batch_size=24)
    assert np.allclose(one.nats, many.nats, rtol=1e-5)
    assert one.by_timestep[0].keys() == many.by_timestep[0].keys()


def test_bins_add_up(models: dict[str, Any], data: PreparedData) -> None:
    report = evaluate_likelihood(models["student"], data, scoring_inputs(data, "student"), mc_samples=5)
    masked = sum(row["masked_tokens"] for row in report.by_timestep)
    right = sum(row["masked_tokens"] * row["masked_token_accuracy"] for row in report.by_timestep)
    assert right / masked == pytest.approx(report.accuracy.value)
    for row in report.by_timestep:
        for name in ("bits_per_masked_token", "masked_token_accuracy"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert any(row["bits_per_masked_token_low"] < row["bits_per_masked_token_high"] for row in report.by_timestep)
    assert [row["low"] for row in report.by_timestep] == sorted(row["low"] for row in report.by_timestep)
    assert json.loads(json.dumps(report.to_dict()))["bits_per_byte"]["value"] == report.bits_per_byte.value


def test_paired_difference(models: dict[str, Any], data: PreparedData) -> None:
    student = evaluate_likelihood(models["student"], data, scoring_inputs(data, "student"), mc_samples=2)
    teacher = evaluate_likelihood(models["teacher"], data, scoring_inputs(data, "teacher"), mc_samples=2)
    difference = student.minus(teacher)
    assert difference.value == pytest.approx(student.bits_per_byte.value - teacher.bits_per_byte.value)
    same = student.minus(student)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    # Paired on the same masks, a difference is known better than either number.
    assert difference.high - difference.low < student.bits_per_byte.high - student.bits_per_byte.low
    other = evaluate_likelihood(models["teacher"], data, scoring_inputs(data, "teacher"), mc_samples=3)
    with pytest.raises(ValueError, match="same settings"):
        student.minus(other)
    scoring = scoring_inputs(data, "student")
    blocks = evaluate_likelihood(models["student"], data, scoring, mc_samples=2, noise=PER_BLOCK)
    with pytest.raises(ValueError, match="differ in samples, mc_samples, noise or seed; measure both with the same"):
        student.minus(blocks)


def test_bootstrap_interval_has_its_coverage() -> None:
    """About 95 of 100 intervals hold the true ratio, and the interval is that of resampling, not of chance."""
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        bottom = generator.uniform(1, 3, 60)
        top = 2.0 * bottom + generator.normal(0, 1, 60)
        found = ratio(top, bottom, seed=trial)
        held += found.low <= 2.0 <= found.high
    assert 86 <= held <= 100
    constant = ratio(np.full(50, 3.0), np.full(50, 2.0), seed=0)
    assert (constant.value, constant.low, constant.high) == (1.5, 1.5, 1.5)


def test_mean_and_its_interval() -> None:
    estimate = mean([True, False, True, True], seed=0)
    assert estimate.value == 0.75
    assert estimate.low < 0.75 < estimate.high <= 1.0


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_validation_is_shared_out_over_ranks(models: dict[str, Any], data: PreparedData, world_size: int) -> None:
    """Ranks' shares add up to the whole; an empty share is no obstacle."""
    model, side, shares = models["student"].train(), scoring_inputs(data, "student"), []

    def collect(rank: int) -> SimpleNamespace:
        return SimpleNamespace(
            rank=rank, size=world_size, sum_over_ranks=lambda n: shares.append(n) or list(map(sum, zip(*shares)))
        )

    for rank in range(world_size):
        values = validate(model, data, side, world=collect(rank), samples=4, batch_size=3, seed=2)
    expected = evaluate_likelihood(model, data, side, samples=4, mc_samples=VALIDATION_MC_SAMPLES, seed=2)
    assert values["validation/bits_per_byte"] == pytest.approx(expected.bits_per_byte.value, rel=1e-6)
    assert values["validation/masked_token_accuracy"] == pytest.approx(expected.accuracy.value)
    assert model.training
    model.eval()


def test_samples_are_spread_over_the_data() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 0).tolist() == spread(3, 99).tolist() == [0, 1, 2]


def test_numbers_that_are_none_are_not_reported(lab: Lab, data: PreparedData) -> None:
    damaged = load_model(lab.student)
    damaged.head_weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="mine: log-probabilities are no numbers"):
        evaluate_likelihood(damaged, data, scoring_inputs(data, "student"), samples=2, label="mine")


def test_wrong_settings_are_named(models: dict[str, Any], data: PreparedData) -> None:
    with pytest.raises(ValueError, match="mc_samples"):
        evaluate_likelihood(models["student"], data, scoring_inputs(data, "student"), mc_samples=0)
    with pytest.raises(ValueError, match="context 'sideways'"):
        scoring_inputs(data, "teacher", "sideways")
    for layout in ("full", "block_causal"):
        with pytest.raises(ValueError, match="noise 'block' needs teacher context staircase"):
            evaluate_likelihood(models["teacher"], data, scoring_inputs(data, "teacher", layout), noise=PER_BLOCK)
