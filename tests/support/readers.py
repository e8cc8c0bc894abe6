"""One valid file of each kind that the project reads, and the call that the user's command reads it by.

Those that only the report reads are in tests/report/test_damage.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_tide.bridge import Bridge, load_tokenizer
from megatron_tide.bridge.artifact import _fingerprint
from megatron_tide.bridge.samples import read_samples
from megatron_tide.bridge.train_tokenizers import TokenizerTraining, read_messages, train_byte_bpe
from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.data.corpus import _existing
from megatron_tide.data.sources import open_mixture
from megatron_tide.files import fingerprint, sha256_file
from megatron_tide.generate.prompts import read_prompts
from megatron_tide.hub import stated_block_size
from megatron_tide.models import generation_of, load_model
from megatron_tide.models.gguf_file import gguf_to_folder
from megatron_tide.models.gguf_release import read_release
from megatron_tide.models.shards import ShardedFolder
from tests.support.commands import command
from tests.support.readable import Read, World, own_flags, sealed, sides_of

TALK = [{"role": "user", "content": "Add <|im_end|> two."}]


def tokenizer(name: str) -> Read:
    def read(world: World) -> object:
        found = load_tokenizer(world.root / name)
        found.describe()
        found.encode_with_bytes("a b\u00e9 <|im_end|>")
        return found.encode_prompt(found.render(TALK)) if found.template_fingerprint else None

    return read


def dry_run(*flags: str) -> Read:
    def read(world: World) -> object:
        names = ("student", "teacher", "bridge", "data")
        given = [str(part) for name in names for part in (f"--{name}", world.root / name)]
        given += ["--global-batch-size", "8", "--micro-batch-size", "4", "--out", str(world.out / "run"), "--dry-run"]
        return command("distill")([*given, *(flag.format(root=world.root) for flag in flags)])

    return read


def model(name: str) -> Read:
    def read(world: World) -> object:
        folder = world.root / name
        stated_block_size(str(folder))
        generation_of(folder)
        ShardedFolder(folder).fingerprint()
        return load_model(folder)

    return read


def written(name: str) -> Read:
    def read(world: World) -> object:
        asked = ["--prompt", "Count.", "--max-new-tokens", "2", "--device", "cpu"]
        return command("generate")([str(world.root / name), *asked])

    return read


def plan(world: World) -> object:
    paths = ["--student", str(world.root / "student"), "--teacher", str(world.root / "teacher")]
    return command("plan")([*paths, "--gpus", "1", "--gpu-mem", "24"])


def student_from(name: str) -> Read:
    def read(world: World) -> object:
        out = ["--out", str(world.out / "student"), "--fresh"]
        return command("init-model")(["--from", str(world.root / name), *out])

    return read


def random_model(world: World) -> object:
    shapes = ["--config", str(world.root / "student.json"), "--tokenizer", str(world.root / "student"), "--seed", "1"]
    return command("init-model")([*shapes, "--out", str(world.out / "random"), "--fresh"])


def gguf(world: World) -> object:
    shutil.rmtree(world.out / "gguf", ignore_errors=True)
    return gguf_to_folder(world.root / "ar.gguf", world.out / "gguf")


def gguf_of_a_release(world: World) -> object:
    return read_release(world.root / "student.gguf"), tokenizer("student.gguf")(world)


def bridge(seal: bool) -> Read:
    def right(record: Any) -> None:
        record["manifest"]["fingerprint"] = _fingerprint(record["manifest"])
        record["sha256"] = fingerprint(record["manifest"])

    def read(world: World) -> object:
        folder = world.root / "bridge"
        if seal and not (folder / "manifest.json").is_fifo():
            sealed(folder / "manifest.json", right)
        sides = load_tokenizer(world.root / "student"), load_tokenizer(world.root / "teacher")
        Bridge.load(folder).check(*sides).align_text("def add(a, b):")
        command("bridge")([*sides_of(world), "--sample", str(world.root / "sample.jsonl"), "--out", str(folder)])
        return dry_run()(world)

    return read


def data(seal: bool, shard: bool = False) -> Read:
    def right(manifest: Any) -> None:
        if shard:
            manifest["shards"][0]["sha256"] = sha256_file(shard_path)
        manifest.pop("fingerprint")
        manifest["fingerprint"] = fingerprint(manifest)

    def read(world: World) -> object:
        nonlocal shard_path
        path, shard_path = world.root / "data/manifest.json", world.root / "data/shard-00000.arrow"
        before = path.read_bytes() if shard else b""
        if seal and path.is_file() and (not shard or shard_path.is_file()):
            sealed(path, right)
        try:
            found = PreparedData.open(world.root / "data")
            assert seal or found.manifest["fingerprint"] == fingerprint(
                {key: value for key, value in found.manifest.items() if key != "fingerprint"}
            )
            for number in range(len(found)):
                found.sample(number)
            return dry_run()(world)
        finally:
            if shard:
                path.write_bytes(before)

    shard_path = Path()
    return read


def preparing(source: str) -> Read:
    def read(world: World) -> object:
        flags = ["--data", str(world.root / source), *sides_of(world), "--bridge", str(world.root / "bridge")]
        flags += ["--student-length", "96", "--teacher-length", "96", "--shard-rows", "16", "--workers", "1"]
        return command("prepare")([*flags, "--out", str(world.root / "data")])

    return read


def rows(source: str) -> Read:
    def read(world: World) -> object:
        mixture = open_mixture([str(world.root / source)])
        for position in range(len(mixture)):
            mixture.error(position)
        shutil.rmtree(world.out / "rows", ignore_errors=True)
        flags = ["--data", str(world.root / source), "--student", str(world.root / "student"), "--workers", "1"]
        return command("prepare")([*flags, "--student-length", "96", "--out", str(world.out / "rows")])

    return read


def own_rows(world: World) -> object:
    shutil.rmtree(world.out / "own", ignore_errors=True)
    return command("prepare")([*own_flags(world), "--out", str(world.out / "own")])


def own_data(world: World) -> object:
    found = PreparedData.open(world.root / "own")
    return [read_batch(found, [number]).order for number in range(len(found))]


def trained_tokenizer(world: World) -> object:
    folder = world.root / "tokenizers/student"
    return TokenizerTraining(folder, 320, train_byte_bpe, "tokenizers").run([], "sum", False)


CASES: dict[str, tuple[str, Read]] = {
    "config.json": ("student/config.json", model("student")),
    "config.json of a teacher": ("teacher/config.json", model("teacher")),
    "config.json for a plan": ("teacher/config.json", plan),
    "config.json for new weights": ("student.json", random_model),
    "config.json of a source": ("ar/config.json", student_from("ar")),
    "generation_config.json": ("student/generation_config.json", model("student")),
    "safetensors": ("student/model.safetensors", model("student")),
    "config.json of a baseline": ("ar/config.json", written("ar")),
    "generation_config.json of a baseline": ("ar/generation_config.json", written("ar")),
    "weights of a baseline": ("ar/model.safetensors", written("ar")),
    "index of shards": ("sharded/model.safetensors.index.json", model("sharded")),
    "shard of safetensors": ("sharded/model-00001-of-00003.safetensors", model("sharded")),
    "gguf": ("ar.gguf", gguf),
    "gguf of a release": ("student.gguf", gguf_of_a_release),
    "tokenizer.json": ("student/tokenizer.json", tokenizer("student")),
    "tokenizer.json of a source": ("ar/tokenizer.json", student_from("ar")),
    "tokenizer_config.json": ("student/tokenizer_config.json", tokenizer("student")),
    "tokenizer_config.json of SentencePiece": ("teacher/tokenizer_config.json", tokenizer("teacher")),
    "special_tokens_map.json": ("ar/special_tokens_map.json", student_from("ar")),
    "added_tokens.json": ("student/added_tokens.json", tokenizer("student")),
    "vocab.json": ("bpe/vocab.json", tokenizer("bpe")),
    "merges.txt": ("bpe/merges.txt", tokenizer("bpe")),
    "chat template": ("student/chat_template.jinja", tokenizer("student")),
    "tokenizer.model": ("teacher/tokenizer.model", tokenizer("teacher")),
    "tiktoken": ("tik/x.tiktoken", tokenizer("tik")),
    "tiktoken's settings": ("tik/x.tiktoken.json", tokenizer("tik")),
    "receipt of a tokenizer": ("tokenizers/student/training.json", trained_tokenizer),
    "manifest of a bridge": ("bridge/manifest.json", bridge(False)),
    "manifest of a bridge, sealed": ("bridge/manifest.json", bridge(True)),
    "map of a bridge": ("bridge/vocab_map.safetensors", bridge(False)),
    "manifest of data": ("data/manifest.json", data(False)),
    "manifest of data, sealed": ("data/manifest.json", data(True)),
    "shard of data": ("data/shard-00000.arrow", data(False)),
    "shard of data, sealed": ("data/shard-00000.arrow", data(True, shard=True)),
    "settings of data": ("data/settings.json", preparing("corpus.jsonl")),
    "shard of data being prepared": ("data/shard-00000.arrow", preparing("corpus.jsonl")),
    "conversations": ("corpus.jsonl", rows("corpus.jsonl")),
    "conversations in Parquet": ("corpus.parquet", rows("corpus.parquet")),
    "saved data set": ("saved/dataset_dict.json", rows("saved")),
    "saved data set's state": ("saved/train/state.json", rows("saved")),
    "saved data set's columns": ("saved/train/dataset_info.json", rows("saved")),
    "saved data set's rows": ("saved/train/data-00000-of-00001.arrow", rows("saved")),
    "data folder's card": ("described/README.md", rows("described")),
    "mixture": ("mixture.json", rows("mixture.json")),
    "responses as written": ("own.jsonl", own_rows),
    "mixture of responses as written": ("own.json", own_rows),
    "shard of responses as written": ("own/shard-00000.arrow", own_data),
    "sample": ("corpus.jsonl", lambda world: read_samples([world.root / "corpus.jsonl"], 10)),
    "sample in Parquet": ("corpus.parquet", lambda world: read_samples([world.root / "corpus.parquet"], 10)),
    "texts of tokenizers": ("corpus.jsonl", lambda world: read_messages(world.root / "corpus.jsonl")),
    "prompts": (
        "corpus.jsonl",
        lambda world: read_prompts(world.root / "corpus.jsonl", load_tokenizer(world.root / "student")),
    ),
    "manifest of a corpus": (
        "tiny/corpus/manifest.json",
        lambda world: _existing(world.root / "tiny/corpus/manifest.json", "file"),
    ),
    "run.json as --config": ("tiny/run.json", dry_run("--config", "{root}/tiny/run.json")),
    "DeepSpeed": ("ds.json", dry_run("--deepspeed", "{root}/ds.json")),
    "DeepSpeed of the teacher": ("ds_teacher.json", dry_run("--teacher-deepspeed", "{root}/ds_teacher.json")),
}
