"""Noise per block against one timestep per sample: variance of the gradient, and bits per byte after equal training.

Four forms, each with what the one before it has; all estimate the same loss (``NoiseSampling``):

  published                one timestep per sample, uniform; a coin flip per token
  block                    a timestep per block
  block+stratified         timesteps spread evenly over the blocks of a sample and over the batch
  block+stratified+exact   k of a block's n tokens masked, k uniform on 1..n, weight n / k

Variance: at fixed weights, the gradient g of the denoising loss on one batch of --samples samples, under --draws seeds
of the noise: E|g - mean g|^2 and the variance of |g|, and their ratios to the published form's, with 95 % bootstrap
intervals over the draws. Training: from random weights, --steps steps of 8 samples by denoising only, for each of
--seeds seeds (of initial weights, order of the data and noise; the same for all forms). Bits per byte are those of
held-out data, under the same masks for every run; differences to the published form are paired by seed, with 95 %
bootstrap intervals over the seeds.

Without --student, --data and --test-data the quickstart's corpus, tokenizer and student, with blocks of 8, are made in
--folder. What is measured is written there after every run; started again, the rest is measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import report
from megatron_tide import cli
from megatron_tide.config import from_flat
from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.data.prepared import MANIFEST
from megatron_tide.diffusion import build_inputs, noise
from megatron_tide.evaluate.bootstrap import LEVEL, RESAMPLES, Estimate, Floats, mean
from megatron_tide.files import read_json, remove, write_json
from megatron_tide.models import load_model, masked_hidden_states, target_logprobs
from megatron_tide.objectives import build_strategy, denoise_loss

ROOT = Path(__file__).parents[1]
PUBLISHED = "published"
FORMS: dict[str, dict[str, str]] = {PUBLISHED: {}, "block": {"timesteps": "block"}}
FORMS["block+stratified"] = {**FORMS["block"], "timestep_sampling": "stratified"}
FORMS["block+stratified+exact"] = {**FORMS["block+stratified"], "mask_count": "exact"}
TRAINING = "--lr 3e-3 --beta2 0.98 --precision fp32 --global-batch-size 8 --micro-batch-size 8 --log-every 50"
SCORING = "--samples 96 --mc-samples 4 --likelihood-noise block"
CONFIG, BLOCK, LENGTH = ROOT / "recipes/quickstart/student.json", 8, 128  # of the student and data that are made here


def settings_of(form: str) -> dict[str, str]:
    return {"strategy": "bd3lm", "masking": "synchronous", **FORMS[form]}


def command(words: list[str], folder: Path) -> None:
    """Commands of the package, joined by --then, in a process of their own that works in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    called = [sys.executable, "-m", "megatron_tide", *words]
    done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{words[0]} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Folders of a student with random weights, of its data, and of held-out data; once made they are kept."""
    if not (folder / "test-data" / MANIFEST).exists():
        words = "corpus --out corpus --then train-tokenizers --data corpus/train.jsonl --student-out tokenizer --fresh "
        words += "--teacher-out teacher-tokenizer --then init-model --tokenizer tokenizer --out student --fresh "
        words += f"--seed 0 --block-size {BLOCK} --config"
        prepare = f"--student student --student-length {LENGTH} --fresh"
        first = f"--then prepare {prepare} --data corpus/train_tenth.jsonl --out data"
        second = f"--then prepare {prepare} --data corpus/test.jsonl --out test-data"
        command([*words.split(), str(CONFIG), *first.split(), *second.split()], folder)
    return folder / "student", folder / "data", folder / "test-data"


def gradients(form: str, model: Any, data: PreparedData, samples: int, draws: int) -> Tensor:
    """float32 [draws, parameters]: of the denoising loss on the same samples, one draw of the noise each."""
    strategy = build_strategy(from_flat(settings_of(form)).strategy, None)
    batch, side = read_batch(data, range(samples)), data.manifest["student"]
    how: dict[str, Any] = {"masking": strategy.masking, "schedule": strategy.noise_schedule, "block": side["block"]}
    how["sampling"] = strategy.noise_sampling
    parameters, rows = list(model.parameters()), []
    for draw in range(draws):
        strata = (np.random.default_rng(draw).permutation(samples), samples)
        drawn = noise(batch, seed=draw, epoch=0, strata=strata, **how)
        noised = build_inputs(batch, drawn, student_block=side["block"], student_mask_id=side["mask_id"], teacher=None)
        hidden = masked_hidden_states(model, noised.student)
        logp = target_logprobs(hidden, model.head_weight, noised.student_targets)
        loss = denoise_loss(logp, noised.inverse_weight[noised.student_level], noised.maskable)
        rows.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def variances(gram_GG: Floats, times_RG: Floats) -> Floats:
    """[2, R]: E|g - mean g|^2 and the variance of |g|, from the inner products of G gradients, where gradient i is
    counted times[i] times (G in total)."""
    count, square_G = len(gram_GG), gram_GG.diagonal()
    vector = times_RG @ square_G - ((times_RG @ gram_GG) * times_RG).sum(1) / count
    norm = times_RG @ square_G - (times_RG @ np.sqrt(square_G)) ** 2 / count
    return np.stack((vector, norm)) / (count - 1)


def variance_figures(student: Path, data: PreparedData, samples: int, draws: int) -> dict[str, dict[str, Any]]:
    """For each form."""
    model, grams = load_model(student).eval(), {}
    for form in FORMS:
        found = gradients(form, model, data, samples, draws).double()
        grams[form] = (found @ found.T).numpy()
        print(f"{form}: {draws} gradients", file=sys.stderr, flush=True)
    once = np.ones((1, draws))
    times = np.random.default_rng(0).multinomial(draws, once[0] / draws, size=RESAMPLES).astype(np.float64)
    figures: dict[str, dict[str, Any]] = {form: {} for form in FORMS}
    for form, gram in grams.items():
        values, published = (variances(one, once)[:, 0] for one in (gram, grams[PUBLISHED]))
        resampled = variances(gram, times) / variances(grams[PUBLISHED], times)
        ends = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1).T
        for name, value, base, end in zip(("gradient", "norm"), values, published, ends.tolist()):
            ratio = Estimate(float(value / base), *end).to_dict()
            figures[form] |= {f"{name}_variance": float(value), f"{name}_variance_ratio": ratio}
    return figures


def train(form: str, seed: int, options: argparse.Namespace) -> float:
    """Held-out bits per byte after one training run; nothing of it is left."""
    run, student = options.folder / "run", options.student
    remove(run)
    run.mkdir()
    block = PreparedData.open(options.data).manifest["student"]["block"]
    words = ["init-model", "--config", f"{student}/config.json", "--tokenizer", str(student)]
    words += f"--block-size {block} --seed {seed} --out init --then distill --student init --out trained".split()
    words += [*f"--seed {seed} --max-steps {options.steps} {TRAINING}".split(), "--data", str(options.data)]
    words += [part for name, value in settings_of(form).items() for part in (f"--{name.replace('_', '-')}", value)]
    words += f"--then evaluate --student trained --json scores.json {SCORING} --data".split()
    command([*words, str(options.test_data)], run)
    (model,) = read_json(run / "scores.json")["models"]
    remove(run)
    return float(model["bits_per_byte"]["value"])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured: ``variance`` by form, and ``bits_per_byte`` by form and seed; kept in the folder."""
    path = options.folder / "measured.json"
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "folder", "seeds")}
    found: dict[str, Any] = read_json(path) if path.exists() else {"settings": settings, "bits_per_byte": {}}
    if found["settings"] != settings:
        raise ValueError(f"{path}: measured with other settings; give the same ones, or another --folder")
    if "variance" not in found:
        data = PreparedData.open(options.data)
        found["variance"] = variance_figures(options.student, data, options.samples, options.draws)
        write_json(path, found)
    for seed in range(options.seeds):
        for form in FORMS:
            of_form = found["bits_per_byte"].setdefault(form, {})
            if str(seed) not in of_form:
                of_form[str(seed)] = train(form, seed, options)
                write_json(path, found)
                print(f"{form}, seed {seed}: {of_form[str(seed)]:.4f} bits per byte", file=sys.stderr, flush=True)
    return found


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/noise-benchmark", metavar="DIR", help="to work in")
    parser.add_argument("--student", type=Path, metavar="DIR", help="weights for the variance, shapes for the training")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data to train on")
    parser.add_argument("--test-data", type=Path, metavar="DIR", help="prepared data to score")
    parser.add_argument("--samples", type=int, default=8, help="in the batch of the variance (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=64, help="of its noise (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of each training run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of each form (default: %(default)s)")
    options = parser.parse_args(argv)
    given = [options.student, options.data, options.test_data]
    if any(given) != all(given):
        raise ValueError("give all of --student, --data and --test-data, or none of them")
    if min(options.samples, options.draws - 7, options.steps, options.seeds) < 1:
        raise ValueError("--samples, --steps and --seeds must be at least 1, --draws at least 8")
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    paths = [path.resolve() for path in given] if all(given) else make_inputs(options.folder)
    options.student, options.data, options.test_data = paths
    found = measured(options)
    figures: dict[str, Any] = {name: getattr(options, name) for name in ("samples", "draws", "steps", "seeds")}
    figures |= {"training": TRAINING, "scoring": SCORING, **found["variance"]}
    bits = {form: [found["bits_per_byte"][form][str(seed)] for seed in range(options.seeds)] for form in FORMS}
    for form, values in bits.items():
        differences = [mine - theirs for mine, theirs in zip(values, bits[PUBLISHED])]
        figures[form] |= {"bits_per_byte": values, "minus_published": mean(differences, 0).to_dict()}
    report("noise", figures, options.json)


if __name__ == "__main__":
    cli.run(main)
