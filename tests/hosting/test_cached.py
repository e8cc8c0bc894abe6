"""A teacher's outputs from disk: the live teacher's numbers, and nothing else's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cache as benchmark
from megatron_tide import cli, distill
from megatron_tide.commands import cache as cache_command
from megatron_tide.config import from_flat
from megatron_tide.files import fingerprint
from megatron_tide.hosting.cached import CachedTeacher, OutputCache
from megatron_tide.hosting.memory import Machine
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.models import load_model
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Counts
from megatron_tide.train import fill_cache as filling
from megatron_tide.train.build import make_loader, record_models
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.loop import StopRequest
from tests.hosting.backends import joined
from tests.support.commands import command
from tests.support.filled_caches import ASKS, WORLD, filled, reading
from tests.support.ranks import run_on_ranks
from tests.support.runs import read_curve


class StopAfter(StopRequest):
    """A signal that comes while the given number of forwards is asked."""

    def __init__(self, forwards: int) -> None:
        self.left = forwards

    @property
    def signal(self) -> int:
        self.left -= 1
        return int(self.left < 0)


@pytest.fixture(scope="module")
def folder(chain, tmp_path_factory):
    """All categories, 8 steps in several shards."""
    out = tmp_path_factory.mktemp("cache") / "answers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "SHARD_BYTES", 3 * step_bytes(chain, out))
        manifest, _ = filled(chain, out)
    assert len(manifest["seeds"]["42"]["shards"]) == 3
    return out


def step_bytes(chain, out, **flags):
    config = from_flat(chain.run(out, **{**ASKS, **flags}))
    inputs = read_run_inputs(config, 1)
    return filling.forecast(config, inputs, make_loader(config, inputs, WORLD), 1, cache_command.Rates()).step_bytes


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "answers")


def outputs_of(chain, folder, **flags):
    """Of every step: the micro-batches, what the live teacher says, what the cache says; and the strategy."""
    inputs, loader = reading(chain, folder, **flags)
    live = ReplicatedTeacher(load_model(chain.root / "teacher"), inputs.strategy)
    stored = CachedTeacher(inputs.cache, inputs.strategy)
    steps = [loader(step) for step in inputs.with_teacher]
    return inputs.strategy, [(batches, live.score(batches), stored.score(batches)) for batches in steps]


def test_bit_for_bit_the_live_teachers_numbers(chain, folder):
    strategy, steps = outputs_of(chain, folder)
    width = load_model(chain.root / "student").head_weight.shape[0]
    pairs = 0
    for batches, live, stored in steps:
        for batch, one, other in zip(batches, live, stored, strict=True):
            assert torch.equal(other.target_logprobs, one.target_logprobs)
            (scores,) = strategy.rows.target(one.hidden @ one.head_weight.T, width)
            assert torch.equal(other.scores, scores)
            assert len(scores) == len(batch.pair_chunk)
            pairs += len(scores)
    assert pairs > 100


@pytest.mark.parametrize(
    "flags",
    [{"micro_batch_size": 1}, {"micro_batch_size": 8}, {"pretraining": "ar:0.5"}],
    ids=["one-by-one", "at-once", "only-the-last-phase"],
)
def test_other_micro_batches_and_phases_ask_the_same(chain, folder, flags):
    for _, live, stored in outputs_of(chain, folder, **flags)[1]:
        for one, other in zip(live, stored):
            torch.testing.assert_close(other.target_logprobs, one.target_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"strategy": "tide-cross", "compdemo": True, "temperature": 7.0},
        {"strategy": "kl", "compdemo": True, "tidal": "mix"},
    ],
    ids=["everything", "chunks-only-at-another-T", "rows-only"],
)
def test_the_loss_and_its_gradient_are_the_live_teachers(chain, folder, flags):
    """A strategy that needs less than was filled reads it too; T decides distributions only."""
    strategy, steps = outputs_of(chain, folder, **flags)
    compare_losses(chain, strategy, steps)


def test_the_most_likely_categories(chain, tmp_path):
    """With --teacher-top, live and cached are the same again; the divergence is a lower bound of the whole one."""
    manifest, _ = filled(chain, tmp_path / "answers", max_steps=2, teacher_top=5)
    assert 0 < manifest["covered_mass"] < 1
    strategy, steps = outputs_of(chain, tmp_path / "answers", max_steps=2, teacher_top=5)
    assert all(said.top.shape == (len(said.scores), 5) for _, _, stored in steps for said in stored)
    covered, kl = compare_losses(chain, strategy, steps)
    assert covered == pytest.approx(manifest["covered_mass"], abs=1e-5)
    whole = replace(strategy, rows=replace(strategy.rows, top=0))
    everything = [(batches, live, live) for batches, live, _ in steps]
    assert 0 < kl < compare_losses(chain, whole, everything)[1]


def test_first_rows_of_chunks_of_several_tokens(chain, tmp_path):
    flags = {"max_steps": 2, "distribution_rows": "byte_prefix"}
    filled(chain, tmp_path / "answers", **flags)
    strategy, steps = outputs_of(chain, tmp_path / "answers", **flags)
    assert sum(len(batch.pair_several) for batches, _, _ in steps for batch in batches) > 10
    compare_losses(chain, strategy, steps)
    with pytest.raises(ValueError, match="asked with distribution_rows = byte_prefix, this run has "):
        reading(chain, tmp_path / "answers", max_steps=2)


def compare_losses(chain, strategy, steps):
    """Both losses of every micro-batch, and gradients of the head; (covered mass, mean divergence) of the cache."""
    model = load_model(chain.root / "student", as_student=True)
    counts = Counts(maskable=100.0, chunks=20.0, pairs=10.0)
    sums = {}
    for batches, live, stored in steps:
        for batch, *said in zip(batches, live, stored):
            results = []
            for outputs in said:
                chance = torch.Generator().manual_seed(1)
                hidden = torch.randn(len(batch.student.rows), model.config.hidden_size, generator=chance)
                hidden.requires_grad_()
                strength = strategy.strength(0.5, batch.rate)
                scores = strategy.score(hidden, model.head_weight, batch, outputs, strength)
                loss, metrics = strategy.loss(scores, outputs, batch, strength, counts)
                results.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
            torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-8)
            for name in {"distill/covered_mass", "distill/kl"} & set(metrics):
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = total + metrics[name][0].item(), count + metrics[name][1].item()
    means = {name: total / max(count, 1) for name, (total, count) in sums.items()}
    return means.get("distill/covered_mass"), means.get("distill/kl")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"masking": "expand"}, "the teacher was asked with masking = synchronous, this run has expand"),
        ({"teacher_context": "full"}, "asked with teacher_context = staircase, this run has full"),
        ({"mask_count": "bernoulli"}, "asked with mask_count = exact, this run has bernoulli"),
        ({"timesteps": "sample"}, "asked with timesteps = block, this run has sample"),
        ({"compdemo": False}, "asked with compdemo = True, this run has False"),
        ({"compdemo_ratio": 0.3}, "asked with compdemo_ratio = 0.5, this run has 0.3"),
        ({"temperature": 3.0}, "asked with temperature = 2.0, this run has 3.0"),
        ({"distribution_rows": "byte_prefix"}, "asked with distribution_rows = pairs, this run has byte_prefix"),
        ({"teacher_top": 9}, "asked with teacher_top = 0, this run has 9"),
        ({"teacher_dtype": "bf16"}, "asked with teacher_dtype = fp32, this run has bf16"),
        ({"global_batch_size": 16}, "asked with global_batch_size = 8, this run has 16"),
        ({"block_growth": "4:0.5"}, "asked with block_growth = , this run has 4:0.5"),
        ({"seed": 7}, "has seed 42, not 7; run the cache command with --seeds 7"),
        ({"max_steps": 9}, "has steps 0 to 8 of seed 42, this run needs 0 to 9"),
        (
            {"teacher_cache": ""},
            "--teacher-hosting cached and --teacher-cache DIR (made by the cache command) go together",
        ),
        (
            {"teacher_cache": "/nowhere"},
            "/nowhere/manifest.json: no such file; not a complete cache",
        ),
    ],
)
def test_outputs_of_other_inputs_are_refused_by_name(chain, folder, flags, said):
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the text is checked below
        reading(chain, folder, **flags)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_text_or_teacher_is_refused(chain, folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    cache = OutputCache(folder, manifest)
    for name in ("data", "bridge"):
        with pytest.raises(ValueError, match=f"the teacher was asked with {name} = "):
            cache.refuse_other({**manifest["settings"], name: "0" * 64}, 42, 0, 8)
    lacking = OutputCache(folder, {**manifest, "settings": {**manifest["settings"], "distributions": False}})
    with pytest.raises(ValueError, match="has no distributions, which this strategy needs"):
        lacking.refuse_other(manifest["settings"], 42, 0, 8)
    forged = {name: value for name, value in manifest.items() if name not in ("fingerprint", "seeds")}
    forged["seeds"] = {"42": {"first": 0, "end": 8, "shards": ["../../elsewhere"]}}
    (tmp_path / "manifest.json").write_text(json.dumps({**forged, "fingerprint": fingerprint(forged)}))
    with pytest.raises(ValueError, match="edited, corrupt or of another version"):
        OutputCache.open(tmp_path)
    inputs, _ = reading(chain, folder)
    config = from_flat(chain.run(tmp_path, **ASKS))
    record_models(config, inputs, WORLD)
    assert inputs.run["teacher_fingerprint"] == manifest["settings"]["teacher"]
    live = read_run_inputs(config, 1)
    record_models(config, live, WORLD)
    for name in ("teacher_fingerprint", "affects_loss"):  # a run may go on with the other of the two
        assert live.run[name] == inputs.run[name]
    with pytest.raises(ValueError, match=r"the outputs of another teacher than .*student; use that one"):
        record_models(replace(config, paths=replace(config.paths, teacher=config.paths.student)), inputs, WORLD)


def test_a_cache_holds_every_byte_of_a_large_teacher(chain, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_tide.models.shards.WHOLE", 100)
    monkeypatch.setattr("megatron_tide.models.shards._PIECE", 4)
    teacher = shutil.copytree(chain.root / "teacher", tmp_path / "teacher")
    how = {"teacher": str(teacher), "max_steps": 1}
    filled(chain, tmp_path / "answers", **how)
    before = ShardedFolder(teacher).fingerprint()
    (shard, *_) = teacher.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    assert ShardedFolder(teacher).fingerprint() == before, "the start of a training reads places of each tensor"
    with pytest.raises(ValueError, match="begun with teacher = "):
        filled(chain, tmp_path / "answers", **how)


def test_a_killed_cache_command_goes_on(chain, folder, tmp_path, monkeypatch):
    out = tmp_path / "answers"
    monkeypatch.setattr(filling, "SHARD_BYTES", 3 * step_bytes(chain, out))
    assert filled(chain, out, stop=StopAfter(5))[0] is None  # in the second of three shards
    with pytest.raises(ValueError, match="not a complete cache"):
        OutputCache.open(out)
    first = (out / "42-000000.arrow").stat().st_mtime_ns
    assert not (out / "42-000001.arrow").exists()
    filled(chain, out, steps_per_forward=2)
    assert (out / "42-000000.arrow").stat().st_mtime_ns == first
    assert same_files(out, folder)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")}
    monkeypatch.setattr(filling, "SHARD_BYTES", 10**9)  # a folder keeps the size of its shards
    manifest, _ = filled(chain, out, seeds=(42, 7))
    assert set(manifest["seeds"]) == {"42", "7"}
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    reading(chain, out, seed=7)
    with pytest.raises(ValueError, match="begun with masking = synchronous, now it is expand; use another --out"):
        filled(chain, out, masking="expand")


def same_files(one, other):
    names = [sorted(path.name for path in folder.iterdir() if path.name != ".lock") for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def test_damage_is_named_and_filled_again(chain, folder, tmp_path):
    out = copied(folder, tmp_path)
    shard = out / "42-000001.arrow"
    content = bytearray(shard.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    shard.write_bytes(content)
    inputs, loader = reading(chain, out)
    teacher = CachedTeacher(inputs.cache, inputs.strategy)
    teacher.score(loader(0))
    with pytest.raises(ValueError, match=r"42-000001.arrow: its bytes changed since it was written .*run the cache"):
        teacher.score(loader(4))
    shard.write_bytes(content[:place])
    with pytest.raises(ValueError, match=r"42-000001.arrow: truncated or not a shard"):
        CachedTeacher(inputs.cache, inputs.strategy)
    filled(chain, out)
    assert same_files(out, folder)
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"end": 8', '"end": 9'))
    with pytest.raises(ValueError, match=r"manifest.json: edited, corrupt or of another version"):
        reading(chain, out)


def test_outputs_of_other_inputs_are_never_taken(chain, folder):
    inputs, loader = reading(chain, folder)
    teacher = CachedTeacher(inputs.cache, inputs.strategy)
    (batch, *_) = loader(0)
    with pytest.raises(ValueError, match="is of other inputs than this run's"):
        teacher.score([replace(batch, teacher_targets=batch.teacher_targets + 1)])
    with pytest.raises(ValueError, match="has no outputs for a sample of this run"):
        teacher.score([replace(batch, draw=(43, 0))])


def test_the_forecast_is_what_it_takes(chain, folder, tmp_path, capsys, monkeypatch):
    flags = chain.flags(tmp_path / "answers", **ASKS)
    assert command("cache")([*flags, "--dry-run", "--seeds", "3", "3"]) == 0
    line = capsys.readouterr().out
    assert "8 steps of" in line
    assert "MB (" in line
    assert ", 0:00:00 (h:min:s) by the plan" in line
    assert ", 2 days, 2:00:00 (h:min:s) by the plan" in str(filling.Forecast(1.0, 0.0, 4.0, 1000, 180.0))
    assert not (tmp_path / "answers").exists()
    taken = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    assert 8 * step_bytes(chain, tmp_path) == pytest.approx(taken, rel=0.1)
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(ValueError, match=r"are free; use --teacher-top, fewer steps or another disk"):
        command("cache")([*flags, "--dry-run"])
    monkeypatch.setattr(filling, "local_machine", lambda ranks, disk: Machine(ranks, 0, 2**20))
    with pytest.raises(ValueError, match="--teacher-hosting replicated does not fit: host memory: needs "):
        command("cache")([*flags, "--dry-run"])
    none = chain.flags(tmp_path / "answers", strategy="bd3lm", max_steps=8)
    with pytest.raises(ValueError, match="--strategy bd3lm asks no teacher"):
        command("cache")([*none, "--dry-run"])


def curves(live, fill, cached):
    """Of the same training, with the teacher and from its answers, on this rank."""
    with joined() as world:
        assert distill.train(from_flat(live), world) == 0
        args = cli.parse(cache_command, fill)
        assert cache_command.ask(args.run, args, world) == 0
        assert distill.train(from_flat(cached), world) == 0
        args = cli.parse(benchmark, [*fill, "--steps", "2", "--rounds", "1"])
        config = replace(args.run, paths=replace(args.run.paths, out=f"{cached['out']}-benchmark"))
        config = replace(config, train=replace(config.train, max_steps=2))
        figures = benchmark.figures(config, args, world)
    return *(read_curve(Path(flags["out"])) for flags in (live, cached)), figures


@pytest.mark.ranks
def test_two_ranks_train_the_same_curve_without_a_teacher(chain, mixture, tmp_path):
    flags = {"strategy": "tide-bridge", "max_steps": 4, "micro_batch_size": 2, "temperature": 1.0, "tidal": "off"}
    answers = tmp_path / "answers"
    live = chain.run(tmp_path / "live", teacher=str(mixture), **flags)
    fill = chain.flags(answers, teacher=str(mixture), **flags)
    cached = {"teacher_hosting": "cached", "teacher_cache": str(answers), "teacher": ""}
    cached = chain.run(tmp_path / "cached", **flags, **cached)
    with_teacher, without, figures = run_on_ranks(curves, 2, live, fill, cached, timeout=280)[0]
    for name in ("loss/total", "loss/distill", "train/grad_norm"):
        assert without[name] == with_teacher[name]
    assert min(without["loss/distill"]) > 0.1
    assert figures["bytes"] == pytest.approx(figures["forecast_bytes"], rel=0.3)  # counted on one of two ranks
    assert figures["step_seconds_from_answers"] > 0
