"""A folder with one valid file of each kind that the project reads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from lm_eval.api.instance import Instance
from pyarrow import parquet

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.tiktoken import QWEN_PATTERN
from megatron_tide.evaluate.inference_benchmark import InferenceBenchmark, Measured
from megatron_tide.evaluate.response_cache import ResponseCache
from megatron_tide.models import load_model
from megatron_tide.models.load import write_folder
from tests.support.ar_models import ar_folder, write_gguf
from tests.support.chain import Chain
from tests.support.commands import command
from tests.support.filled_caches import filled
from tests.support.lab import write_checkpoint

STEP = "tiny/step-00000020"
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: rows.parquet}\n---\nRows.\n"


@dataclass(frozen=True)
class World:
    """The files below ``root``; ``out``: where commands may write."""

    root: Path
    out: Path


Read = Callable[[World], object]


def sealed(path: Path, seal: Callable[[Any], object]) -> None:
    """Make the checksums of a JSON file right again, as a tampering hand would; where it can."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        record = json.loads(path.read_text())
        seal(record)
        path.write_text(json.dumps(record))


class Echo:
    """A model for a cache of answers: it writes what it is asked."""

    def set_cache_hook(self, hook: Any) -> None: ...

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [request.args[0] for request in requests]


ASKED = [Instance("generate_until", {}, (f"prompt {n} " * 50, {"until": []}), n) for n in range(30)]


def sides_of(world: World) -> list[str]:
    return [str(part) for side in ("student", "teacher") for part in (f"--{side}", world.root / side)]


def _own(world: World, talks: list[Any]) -> None:
    """Responses as the student wrote them, and the data made of them."""
    tokenizer, rows = load_tokenizer(world.root / "student"), []
    for talk in talks:
        ids = [*tokenizer.encode(talk["messages"][-1]["content"]).tolist(), tokenizer.eos_id]
        rows.append({**talk, "written": {"ids": ids, "order": list(range(1, len(ids) + 1))}})
    (world.root / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(world.root / "own.json", {"sources": [{"path": "own.jsonl", "own": True, "written_column": "written"}]})
    command("prepare")([*own_flags(world), "--out", str(world.root / "own")])


def own_flags(world: World) -> list[str]:
    flags = ["--data", str(world.root / "own.json"), *sides_of(world), "--bridge", str(world.root / "bridge")]
    return [*flags, "--student-length", "96", "--teacher-length", "96", "--workers", "1"]


def make_world(chain: Chain, folder: Path) -> World:
    """Everything that ``CASES`` reads, by the project's own commands where there is one."""
    root, out = Path(shutil.copytree(chain.root, folder / "root")), folder / "out"
    out.mkdir()
    world, student = World(root, out), root / "student"
    shutil.copyfile(root / "corpus.jsonl", root / "sample.jsonl")
    sample = ["--sample", str(root / "sample.jsonl"), "--out", str(root / "bridge"), "--fresh"]
    command("bridge")([*sides_of(world), *sample])
    vocabulary = json.loads((student / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    write(student / "added_tokens.json", ids)
    write(student / "generation_config.json", {"do_sample": False})
    _tokenizers(root, vocabulary)
    write_folder(load_model(student), root / "sharded", max_shard_bytes=50_000)
    ar_folder(root / "ar", "llama")
    write(root / "ar/special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}})
    write_gguf(root / "ar.gguf", root / "ar")
    command("convert-gguf")([str(student), str(root / "student.gguf"), "--type", "bf16"])
    write(root / "ar/generation_config.json", {"do_sample": True, "top_k": 20, "eos_token_id": [1, 2]})
    for name, settings in (("ds", "zero1"), ("ds_teacher", "teacher_zero3")):
        shutil.copyfile(Path(__file__).parents[2] / f"ds_configs/{settings}.json", root / f"{name}.json")
    write_checkpoint(None, root / "tiny", start=student, data=root / "data")  # type: ignore[arg-type]
    write(root / "tiny/run.json", json.loads((root / STEP / "trainer.json").read_text())["run"])
    talks = [json.loads(line) for line in (root / "corpus.jsonl").read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(talks), root / "corpus.parquet")
    (root / "kinds.jsonl").write_text("".join(json.dumps({**talk, "kind": "ax"}) + "\n" for talk in talks))
    sources = [{"path": "kinds.jsonl", "weight": 0.5, "filter": {"kind": {"contains": "x"}}}]
    sources.append({"path": "corpus.jsonl", "max_chars": 1000, "split": "train"})
    write(root / "mixture.json", {"sources": sources})
    _own(world, talks[:16])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(talks)}).save_to_disk(root / "saved")
    (root / "described").mkdir()
    shutil.copyfile(root / "corpus.parquet", root / "described/rows.parquet")
    (root / "described/README.md").write_text(CARD)
    _results(root)
    return world


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def _tokenizers(root: Path, spec: dict[str, Any]) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc", b" a"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    settings = {"pattern": QWEN_PATTERN, "normalizer": "NFC", "added_tokens": ["<|end|>"], "eos_token": "<|end|>"}
    settings |= {"mask_token": "<|end|>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    write(root / "tik/x.tiktoken.json", settings)
    (root / "tik/x.tiktoken").write_text("".join(lines))
    write(root / "bpe/vocab.json", spec["model"]["vocab"])
    merges = "".join(f"{left} {right}\n" for left, right in spec["model"]["merges"])
    (root / "bpe/merges.txt").write_text(f"#version: 0.2\n{merges}")
    write(root / "bpe/tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"})
    library = f"tokenizers {metadata.version('tokenizers')}"
    receipt = {"kind": "train_byte_bpe", "vocab_size": 320, "data_sha256": "sum", "library": library}
    write(root / "tokenizers/student/training.json", receipt)


def _results(root: Path) -> None:
    student, tiny = str(root / "student"), root / "tiny"
    scored = ["--data", str(root / "data"), "--student", f"a={student}", "--student", f"b={tiny}", "--per-sample"]
    scored += ["--samples", "4", "--mc-samples", "1", "--completions", "2", "--completion-tokens", "8"]
    command("evaluate")([*scored, "--json", str(tiny / "scores.json")])
    scores = json.loads((tiny / "scores.json").read_text())
    scores["models"][0]["per_sample"]["nats"][0] += 1.0
    write(root / "scores-2.json", scores)
    scores["models"] = scores["models"][1:]
    write(root / "tuning.json", scores)
    rollouts = dict.fromkeys(("own", "corpus", "tokens", "finished", "empty", "as_written"), 3)
    write(tiny / "round-1-answers/rollouts.json", rollouts)
    write(root / "lr/best-last.json", {"config": {"lr": 1.0}, "trials": {"x": 1.0}, "best": "x"})
    asked = ["--prompt", "Count.", "--max-new-tokens", "4", "--json", str(tiny / "completions.jsonl")]
    command("generate")([student, *asked])
    with ResponseCache(Echo(), root / "kept.sqlite") as cache:
        cache.generate_until(ASKED)
    filled(Chain(root), root / "answers", max_steps=2)
    (root / "cache/megatron_tide").mkdir(parents=True)
    (root / "cache/megatron_tide/evaluation-secret").write_text("0" * 64)
    for name in ("bridge", "one"):
        stamp = {"command": ["true"], "finished": 10.0, "seconds": 60.0, "peak_process_bytes": 2**30}
        write(tiny / f".stages/{name}.json", {**stamp, "inputs": {"a": "b"}})
    sizes = {"parameters": 1, "weights_bytes": 4, "block_size": 8, "prompt_tokens": 3, "memory_bytes": 1}
    sizes |= {"process_bytes": 1, "tokens": 2, "passes": 2}
    side = Measured(path="x", model_type="t", memory_of="m", seconds=(1.0, 2.0), **sizes)
    how: dict[str, Any] = {"settings": {"new_tokens": 2, "dtype": "float32", "device": "cpu", "repeats": 2}}
    how |= {"machine": {"accelerators": [], "cpu": "x", "cores": 2}, "versions": {}, "date": "d"}
    InferenceBenchmark(student=side, teacher=side, **how).write(tiny / "inference_benchmark.json")
    split, files = {"by": "file", "why": "x"}, {"train.jsonl": {"sha256": hashlib.sha256(b"").hexdigest()}}
    write(tiny / "corpus/manifest.json", {"python": platform.python_version(), "files": files, "split": split})
    (tiny / "corpus/train.jsonl").touch()
    command("convert")([str(root / STEP), str(root / "hf"), "--skip-parity"])
    holder = {"host": "x", "boot": "", "processes": 1, "pid": 1, "started": "1", "job": "1", "attempt": ""}
    write(root / "used/.lock", holder)
    os.utime(root / "used/.lock", (1, 1))
