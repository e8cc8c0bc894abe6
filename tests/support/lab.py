"""A tiny project on disk: two trained tokenizers, models of both architectures, bridge, prepared data, a checkpoint.

The checkpoint is written here by hand, file by file, so that what reads it is not tested against its own writer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_tide.bridge import Bridge, load_tokenizer
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.models import load_model
from megatron_tide.objectives import build_strategy
from tests.support.commands import command
from tests.support.models import tiny_llama_config, tiny_student_config, tiny_teacher_config, write_hub_folder
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece

BLOCK, TEACHER_BLOCK = 8, 16


@dataclass(frozen=True)
class Lab:
    """Folders: ``student`` and ``teacher`` in hub format with their tokenizers; two-sided and one-sided data."""

    student: Path
    teacher: Path
    bridge: Path
    data: Path
    student_data: Path
    teacher_data: Path

    def llama(self, folder: Path, **changes: Any) -> Path:
        """A Llama-shaped model made in ``folder``, with the student's tokenizer; by default another student."""
        shutil.copytree(self.student, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
        of_student = json.loads((self.student / "config.json").read_text())
        ids = {key: of_student[key] for key in ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id")}
        return write_hub_folder(folder, tiny_llama_config(**ids, **changes), seed=6)


def make_lab(folder: Path) -> Lab:
    lab = Lab(*(folder / name for name in ("student", "teacher", "bridge", "data", "student-data", "teacher-data")))
    train_byte_bpe(lab.student, TEXTS, 320)
    train_sentencepiece(lab.teacher, TEXTS, 400)
    for path, config in ((lab.student, tiny_student_config), (lab.teacher, tiny_teacher_config)):
        tokenizer = load_tokenizer(path)
        ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        write_hub_folder(path, config(vocab_size=-(-tokenizer.vocab_size // 16) * 16, **ids), seed=5)
    Bridge.build(load_tokenizer(lab.student), load_tokenizer(lab.teacher), TEXTS).save(lab.bridge)
    rows = [
        {"messages": [{"role": "user", "content": f"Print line {n}."}, {"role": "assistant", "content": response(n)}]}
        for n in range(24)
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = ["--student", str(lab.student)], ["--teacher", str(lab.teacher), "--bridge", str(lab.bridge)]
    blocks = ["--student-block", str(BLOCK), "--student-length", "64"]
    _prepare(
        source, lab.data, *student, *teacher, *blocks, "--teacher-block", str(TEACHER_BLOCK), "--teacher-length", "128"
    )
    _prepare(source, lab.student_data, *student, *blocks)
    _prepare(source, lab.teacher_data, "--student", str(lab.teacher), *blocks)
    return lab


def response(number: int) -> str:
    """From a few bytes to more than fits."""
    return f"value_{number} = {number}\n" + "print('again and again')\n" * (number % 11)


def _prepare(source: Path, out: Path, *flags: str) -> None:
    command("prepare")(["--data", str(source), "--out", str(out), "--workers", "1", *flags])


def write_checkpoint(
    lab: Lab, run_folder: Path, *, start: Path, data: Path, step: int = 20, seed: int = 1, distilled: bool = False
) -> Path:
    """A step folder as the trainer leaves it: the model of ``start``, moved a little in every trained parameter."""
    settings: dict[str, Any] = {"student": str(start), "data": str(data), "out": str(run_folder), "max_steps": step}
    bridge = Bridge.load(lab.bridge) if distilled else None
    settings |= {"teacher": str(lab.teacher), "bridge": str(lab.bridge)} if distilled else {"strategy": "bd3lm"}
    config, prepared = from_flat(settings), PreparedData.open(data)
    run = {
        "version": "0",
        "config": config.to_dict(),
        "fingerprint": config.fingerprint,
        "affects_loss": config.loss_flags(),
        "strategy": build_strategy(config.strategy, bridge).describe(),
        "bridge_fingerprint": bridge.fingerprint if bridge else None,
        "data_fingerprint": prepared.fingerprint,
        "data": prepared.manifest,
        "model_folder": str(start),
        "total_steps": step,
    }
    folder = run_folder / f"step-{step:08d}"
    folder.mkdir(parents=True)
    weights = moved(start, seed)
    save_file(weights, folder / "model.safetensors")
    for moment in ("exp_avg", "exp_avg_sq"):
        save_file(
            {name: torch.zeros_like(weight) for name, weight in weights.items()}, folder / f"{moment}.safetensors"
        )
    state = {"step": step, "total_steps": step, "samples_seen": 16 * step}
    (folder / "trainer.json").write_text(json.dumps({"state": state, "run": run}))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "checksums.json").write_text(json.dumps(sums))
    journal = [{"step": step - 10, "loss/total": 9.5, "train/lr": 0.5}, {"step": step, "loss/total": 2.25}]
    journal.append({"step": step + 10, "loss/total": 1.0})
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal) + '{"step": 3')
    return folder


def moved(start: Path, seed: int) -> dict[str, torch.Tensor]:
    """The trained parameters of ``start`` by module name, fp32, each a little away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    parameters = load_model(start).named_parameters()
    return {name: p.detach() + 0.01 * torch.randn(p.shape, generator=generator) for name, p in parameters}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a hub-format folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
