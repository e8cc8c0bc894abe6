"""Malformed inputs of every kind: each gives one line and status 2. ``CASES`` is the list.

A case spoils a copy of a good chain, and names the command that meets it and what it says. No command may execute code
that comes with data or a checkpoint: pickles among the cases would leave a file behind.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_tide import cli, distill
from megatron_tide.training_checkpoint import CHECKSUMS, STATE, newest_complete
from tests.support.chain import Chain
from tests.support.commands import command
from tests.support.lab import Lab, write_checkpoint


@dataclass
class Good:
    """A copy of a chain, to be spoiled: its folders, the flags of a run on it, a checkpoint, the environment."""

    root: Path
    checkpoint: Path
    flags: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, content: object) -> Path:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def change(self, name: str, **values: object) -> None:
        """Change a JSON file's values; None removes one."""
        found = json.loads((self.root / name).read_text()) | values
        self.write(name, {key: value for key, value in found.items() if value is not None})

    def shard(self) -> Path:
        return sorted((self.root / "data").glob("shard-*"))[0]


class Harm:
    """Unpickled, it leaves a file in the working folder."""

    def __reduce__(self):
        return (open, ("harm", "w"))


def dry_run(good: Good) -> list[str]:
    return [*Chain(good.root).flags(good.root / "out", **good.flags), "--dry-run"]


def preparing(good: Good) -> list[str]:
    flags = {"data": "corpus.jsonl", "student": "student", "teacher": "teacher", "bridge": "bridge", "out": "prepared"}
    given = [part for name, path in flags.items() for part in (f"--{name}", str(good.root / path))]
    return [*given, "--workers", "1", *[str(part) for pair in good.flags.items() for part in pair]]


def building(good: Good) -> list[str]:
    sides = [part for side in ("student", "teacher") for part in (f"--{side}", str(good.root / side))]
    return [*sides, "--sample", str(good.root / "corpus.jsonl"), "--out", str(good.root / "made")]


def converting(good: Good) -> list[str]:
    return [str(good.checkpoint), str(good.root / "hf")]


def planning(good: Good) -> list[str]:
    return ["--gpus", "1", "--gpu-mem", "24", *[str(part) for pair in good.flags.items() for part in pair]]


def evaluating(good: Good) -> list[str]:
    return ["--data", str(good.root / "data"), "--student", str(good.root / "student")]


RUN, PREPARE, BRIDGE = (distill.main, dry_run), (command("prepare"), preparing), (command("bridge"), building)
CONVERT, PLAN, EVALUATE = (
    (command("convert"), converting),
    (command("plan"), planning),
    (command("evaluate"), evaluating),
)


def with_config(content):
    return lambda good: good.flags.update(config=good.write("run.json", content))


def with_deepspeed(content, **more):
    return lambda good: good.flags.update(deepspeed=good.write("ds.json", content), **more)


def with_teacher_deepspeed(content):
    return lambda good: good.flags.update(teacher_deepspeed=good.write("ds.json", content))


def cut(path, by=100):
    path.write_bytes(path.read_bytes()[:-by])


def checkpoint_file(name, content):
    """A file of the checkpoint replaced, its checksum made right: what a tampering hand would do."""

    def spoil(good):
        import hashlib

        (good.checkpoint / name).write_bytes(content)
        sums = json.loads((good.checkpoint / CHECKSUMS).read_text())
        sums[name] = hashlib.sha256(content).hexdigest()
        (good.checkpoint / CHECKSUMS).write_text(json.dumps(sums))

    return spoil


CASES = {
    # configs
    "config: not JSON": (RUN, with_config("{"), "run.json: not valid JSON"),
    "config: a list": (RUN, with_config([]), "contains a JSON list, not an object"),
    "config: not text": (RUN, with_config(b"\xff\xfe\x00"), "run.json: not valid JSON"),
    "config: unknown flag": (RUN, with_config({"learning_rate": 1}), "unknown flag 'learning_rate'"),
    "config: wrong type": (RUN, with_config({"max_grad_norm": "high"}), "max_grad_norm = 'high' must be float"),
    "config: null": (RUN, with_config({"max_grad_norm": None}), "max_grad_norm = None must be float"),
    "config: a section that is a number": (RUN, with_config({"train": 3}), "train"),
    # DeepSpeed's JSON, the student's and the teacher's
    "deepspeed: not JSON": (RUN, with_deepspeed("{"), "ds.json: not valid JSON"),
    "deepspeed: stage 3": (RUN, with_deepspeed({"zero_optimization": {"stage": 3}}), "use 1 or 2 for the student"),
    "deepspeed: stage is text": (
        RUN,
        with_deepspeed({"zero_optimization": {"stage": "1"}}),
        "use 1 or 2 for the student",
    ),
    "deepspeed: a section that is a number": (RUN, with_deepspeed({"zero_optimization": 2}), "zero_optimization is 2"),
    "deepspeed: batch size": (
        RUN,
        with_deepspeed({"zero_optimization": {"stage": 1}, "train_batch_size": 4}),
        "remove 'train_batch_size'",
    ),
    "teacher's deepspeed: a list": (RUN, with_teacher_deepspeed([]), "contains a JSON list, not an object"),
    "teacher's deepspeed: unknown device": (
        RUN,
        with_teacher_deepspeed({"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}}),
        "offload_param.device is 'tape'",
    ),
    # manifests
    "data manifest: cut": (RUN, lambda good: cut(good.root / "data/manifest.json"), "data/manifest.json"),
    "data manifest: a list": (RUN, lambda good: good.write("data/manifest.json", []), "data/manifest.json"),
    "data manifest: a key less": (
        RUN,
        lambda good: good.change("data/manifest.json", student=None),
        "data/manifest.json",
    ),
    "bridge manifest: cut": (RUN, lambda good: cut(good.root / "bridge/manifest.json"), "bridge"),
    "bridge manifest: empty object": (RUN, lambda good: good.write("bridge/manifest.json", {}), "bridge"),
    # shards
    "shard: cut": (RUN, lambda good: cut(good.shard()), "shard-"),
    "shard: empty": (RUN, lambda good: good.shard().write_bytes(b""), "shard-"),
    "shard: gone": (RUN, lambda good: good.shard().unlink(), "shard-"),
    "shard: a pickle": (RUN, lambda good: good.shard().write_bytes(pickle.dumps(Harm())), "shard-"),
    "evaluation: a cut shard": (EVALUATE, lambda good: cut(good.shard()), "shard-"),
    # checkpoints
    "checkpoint: cut": (CONVERT, lambda good: cut(good.checkpoint / "model.safetensors"), "model.safetensors: corrupt"),
    "checkpoint: a file less": (CONVERT, lambda good: (good.checkpoint / STATE).unlink(), f"{STATE}: missing"),
    "checkpoint: sums are a list": (
        CONVERT,
        lambda good: (good.checkpoint / CHECKSUMS).write_text("[]"),
        f"no readable {CHECKSUMS}",
    ),
    "checkpoint: a pickle": (CONVERT, checkpoint_file("model.safetensors", pickle.dumps(Harm())), "model.safetensors"),
    "checkpoint: state is a list": (CONVERT, checkpoint_file(STATE, b"[]"), f"{STATE}: contains a JSON list"),
    "checkpoint: state of another kind": (
        CONVERT,
        checkpoint_file(STATE, b'{"state": {}}'),
        f"{STATE}: not a checkpoint description",
    ),
    # models and tokenizers
    "model: config is no JSON": (
        PLAN,
        lambda g: g.flags.update({"--teacher": g.write("m/config.json", "{").parent}),
        "m",
    ),
    "model: unknown type": (
        PLAN,
        lambda g: g.flags.update({"--teacher": g.write("m/config.json", {"model_type": "gpt9"}).parent}),
        "model_type 'gpt9'",
    ),
    "tokenizer: garbage": (BRIDGE, lambda good: good.write("student/tokenizer.json", b"\x00" * 99), "student"),
    "conversations: not JSON": (PREPARE, lambda good: good.write("corpus.jsonl", "{]\n"), "corpus.jsonl"),
    "conversations: no messages": (PREPARE, lambda good: good.write("corpus.jsonl", {"text": "x"}), "messages"),
    "conversations: a pickle": (PREPARE, lambda good: good.write("corpus.jsonl", pickle.dumps(Harm())), "corpus.jsonl"),
    # environment
    "environment: world of two": (RUN, lambda good: good.environment.update(WORLD_SIZE="two"), "WORLD_SIZE='two'"),
    "environment: rank outside": (RUN, lambda good: good.environment.update(RANK="1"), "RANK=1 and WORLD_SIZE=1"),
    "environment: port": (RUN, lambda good: good.environment.update(MASTER_PORT="-1"), "MASTER_PORT='-1'"),
}


@pytest.fixture(scope="module")
def lab_checkpoint(lab: Lab, tmp_path_factory):
    """A checkpoint as the trainer leaves it."""
    return write_checkpoint(lab, tmp_path_factory.mktemp("lab") / "run", start=lab.student, data=lab.data)


def test_there_are_thirty_and_more():
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_two(chain, lab_checkpoint, tmp_path, monkeypatch, capsys, name):
    shutil.copytree(chain.root, tmp_path / "good")
    shutil.copytree(lab_checkpoint.parent, tmp_path / "run")
    good = Good(tmp_path / "good", tmp_path / "run" / lab_checkpoint.name)
    (main, flags), spoil, said = CASES[name]
    spoil(good)
    for variable, value in good.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(main, flags(good))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if "error: " in line]
    assert len(lines) == 1, printed
    assert said in lines[0]
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: cut(folder / "model.safetensors", 1), "model.safetensors: corrupt"),
        (lambda folder: (folder / "exp_avg.safetensors").unlink(), "exp_avg.safetensors: missing"),
        (lambda folder: (folder / CHECKSUMS).unlink(), f"no readable {CHECKSUMS}"),
        (
            lambda folder: (folder / STATE).write_bytes(bytes([(folder / STATE).read_bytes()[0] ^ 1]) + b"x"),
            f"{STATE}: corrupt",
        ),
    ],
    ids=["cut", "a file less", "without sums", "flipped"],
)
def test_a_corrupt_checkpoint_is_named_and_the_one_before_taken(lab_checkpoint, tmp_path, spoil, said):
    for step in (20, 30):
        shutil.copytree(lab_checkpoint, tmp_path / f"step-{step:08d}")
    spoil(tmp_path / "step-00000030")
    told: list[str] = []
    found = newest_complete(tmp_path, told.append)
    assert found is not None
    assert found.name == "step-00000020"
    (line,) = told
    assert "step-00000030" in line
    assert said in line
