"""What training, evaluation and recipes leave: a valid file of each kind, and the call that a command reads it by."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_tide.evaluate.harness import user_secret
from megatron_tide.evaluate.response_cache import ResponseCache
from megatron_tide.files import fingerprint, sha256_file
from megatron_tide.hosting.cached import CachedTeacher
from megatron_tide.lock import RunLock, is_held
from megatron_tide.models import load_model
from megatron_tide.release import write_scores
from megatron_tide.train.build import refuse_other_run
from megatron_tide.train.checkpoint import StoredTensors
from megatron_tide.train.metrics import MetricLogger
from megatron_tide.training_checkpoint import newest_complete, open_checkpoint
from recipes import stage
from recipes.on_policy import report as on_policy_report
from recipes.quickstart import report as quickstart_report
from recipes.study import choose, results
from tests.support.chain import Chain
from tests.support.commands import command
from tests.support.filled_caches import filled, reading
from tests.support.readable import ASKED, STEP, Echo, Read, World, sealed


def checkpoint(file: str, seal: bool) -> Read:
    def read(world: World) -> object:
        folder = world.root / STEP
        before = (folder / "checksums.json").read_bytes() if seal else b""
        if seal and (folder / file).is_file():
            sealed(folder / "checksums.json", lambda sums: sums.update({file: sha256_file(folder / file)}))
        try:
            newest_complete(world.root / "tiny", lambda _: None)
            trained = open_checkpoint(folder)
            run = json.loads((world.root / "tiny/run.json").read_text())
            with suppress(ValueError):
                refuse_other_run(folder, run | {"teacher_fingerprint": None, "student_fingerprint": None})
            generation = ["--max-new-tokens", "2", "--prompt", "Hello"]
            command("generate")([str(folder), *generation])
            flags = ["--skip-parity", "--overwrite"]
            return trained, command("convert")([str(folder), str(world.out / "hf"), *flags])
        finally:
            if seal:
                (folder / "checksums.json").write_bytes(before)

    return read


def resumed_log(world: World) -> object:
    class Main:
        is_main, size, rank = True, 1, 0

        def broadcast_object(self, value: Any) -> Any:
            return value

    folder = shutil.copytree(world.root / "tiny", world.out / "resumed", dirs_exist_ok=True, symlinks=True)
    logger = MetricLogger(Path(folder), Main(), 30, 20)  # type: ignore[arg-type]
    logger.close()
    return open_checkpoint(world.root / STEP)


def staged(world: World) -> object:
    stamps = world.root / "tiny/.stages"
    flags = ["--after", str(stamps / "bridge.json"), "--plan", "bridge one two", "--expected", "bridge=1 one=1 two=1"]
    return stage.main([str(stamps / "one.json"), *flags, "--", "true", str(world.root / "mixture.json")])


def study(world: World) -> object:
    seeds = [str(world.root / "tiny/scores.json"), str(world.root / "scores-2.json")]
    flags = ["--hypothesis", "H1 a < b: x", "--tuning", str(world.root), "--size", "cpu", "--out", str(world.out)]
    return results.main([*seeds, *flags])


def chosen(world: World) -> object:
    return choose.main([str(world.root / "tuning.json"), "--out", str(world.out / "best.json")])


def locked(world: World) -> object:
    is_held(world.root / "used/.lock")
    with RunLock(world.root / "used"):
        shutil.copyfile(world.root / "used/.lock", world.root / "used/now")
    (world.root / "used/.lock").write_bytes((world.root / "used/now").read_bytes())
    return None


def restored(world: World, file: str) -> object:
    """Optimizer state that a training goes on from, its checksum made right."""
    folder = world.root / STEP
    before = (folder / "checksums.json").read_bytes()
    if (folder / file).is_file():
        sealed(folder / "checksums.json", lambda sums: sums.update({file: sha256_file(folder / file)}))
    try:
        newest = newest_complete(world.root / "tiny", lambda _: None)
        shapes = {name: weight.shape for name, weight in load_model(world.root / "student").named_parameters()}
        wanted = {"exp_avg": shapes.keys(), "exp_avg_sq": shapes.keys()}
        return newest and StoredTensors(newest, shapes, wanted)
    finally:
        (folder / "checksums.json").write_bytes(before)


def user_secret_in(world: World) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(world.root / "cache"))
        return user_secret()


def response_cache(world: World) -> object:
    with ResponseCache(Echo(), world.root / "kept.sqlite") as cache:
        found = cache.generate_until(ASKED)
    assert all(isinstance(answer, str) for answer in found)
    return found


def answered_before(world: World) -> object:
    asked = ["--prompt", "Count.", "--max-new-tokens", "4", "--json", str(world.root / "tiny/completions.jsonl")]
    return command("generate")([str(world.root / "student"), *asked])


def teachers_answers(seal: bool) -> Read:
    """Of a folder of answers: the training that reads them."""

    def right(manifest: Any) -> None:
        manifest.pop("fingerprint")
        manifest["fingerprint"] = fingerprint(manifest)

    def read(world: World) -> object:
        if seal and (world.root / "answers/manifest.json").is_file():
            sealed(world.root / "answers/manifest.json", right)
        inputs, loader = reading(Chain(world.root), world.root / "answers", max_steps=2)
        assert inputs.cache is not None
        teacher = CachedTeacher(inputs.cache, inputs.strategy)
        return [teacher.score(loader(step)) for step in range(2)]

    return read


def filled_again(world: World) -> object:
    return filled(Chain(world.root), world.root / "answers", max_steps=2)


CASES: dict[str, tuple[str, Read]] = {
    "moments": (f"{STEP}/exp_avg.safetensors", lambda world: restored(world, "exp_avg.safetensors")),
    "weights of a training that goes on": (
        f"{STEP}/model.safetensors",
        lambda world: restored(world, "model.safetensors"),
    ),
    "answers of a benchmark": ("kept.sqlite", response_cache),
    "answers that are there from before": ("tiny/completions.jsonl", answered_before),
    "teacher's answers": ("answers/manifest.json", teachers_answers(False)),
    "teacher's answers, sealed": ("answers/manifest.json", teachers_answers(True)),
    "shard of a teacher's answers": ("answers/42-000000.arrow", teachers_answers(False)),
    "settings of a cache": ("answers/settings.json", filled_again),
    "manifest of a cache": ("answers/manifest.json", filled_again),
    "secret of a user": (
        "cache/megatron_tide/evaluation-secret",
        user_secret_in,
    ),
    "checksums": (f"{STEP}/checksums.json", checkpoint("", False)),
    "trainer.json": (f"{STEP}/trainer.json", checkpoint("", False)),
    "trainer.json, sealed": (f"{STEP}/trainer.json", checkpoint("trainer.json", True)),
    "weights": (f"{STEP}/model.safetensors", checkpoint("", False)),
    "weights, sealed": (f"{STEP}/model.safetensors", checkpoint("model.safetensors", True)),
    "metrics": ("tiny/metrics.jsonl", resumed_log),
    "lock": ("used/.lock", locked),
    "model card": ("hf/README.md", lambda world: write_scores(world.root / "hf", [])),
    "stamp": ("tiny/.stages/one.json", staged),
    "stamp before": ("tiny/.stages/bridge.json", staged),
    "mixture of a stage": ("mixture.json", staged),
    "scores of the quickstart": (
        "tiny/scores.json",
        lambda world: quickstart_report.main([str(world.root / "tiny"), "--seed", "1"]),
    ),
    "stamp of the quickstart": (
        "tiny/.stages/one.json",
        lambda world: quickstart_report.main([str(world.root / "tiny"), "--seed", "1"]),
    ),
    "summary of a round's answers": (
        "tiny/round-1-answers/rollouts.json",
        lambda world: on_policy_report.main([str(world.root / "tiny"), "--rounds", "1"]),
    ),
    "scores of a study": ("tiny/scores.json", study),
    "scores of tuning": ("tuning.json", chosen),
    "run.json of a trial": ("tiny/run.json", chosen),
    "tuning's choice": ("lr/best-last.json", study),
}
