"""Scores of models: held-out likelihood, HumanEval, and the benchmarks of the paper through lm-eval, in one table.

    python tools/evaluate.py runs/quickstart/hf --tasks humaneval
    python tools/evaluate.py student=runs/x/hf teacher=org/LLaDA2.0-mini ar=org/Qwen3-0.6B --out runs/scores \\
        --tasks gsm8k math bbh mmlu_pro hellaswag mmlu humaneval mbpp --device cuda --dtype bfloat16
    python tools/evaluate.py --data runs/quickstart/test-data --teacher runs/quickstart/teacher \\
        --student start=runs/quickstart/student --student tide-cross=runs/quickstart/tide-cross --json scores.json

A model is a folder in hub format, a hub name, or a checkpoint of the trainer, written PATH or NAME=PATH. Students and
diffusion teachers decode in blocks; any causal language model of transformers is a baseline. Settings are the paper's
(--preset paper). Answers are cached in --out: a stopped evaluation, run again, continues. Intervals: 95 % bootstrap.

likelihood (the default) is the diffusion bound in bits per byte on --data, with the same masks for every row: students
read the student's half of two-sided prepared data and teachers the teacher's, so that all of them guess the same bytes
from the same bytes. Differences are paired, to the first student. --tasks also takes any task of lm-eval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_tide import cli
from megatron_tide.machine import DEVICE_HELP, device_of

LIKELIHOOD = "likelihood"


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="*", metavar="[NAME=]MODEL", help="models for every task")
    add("--student", action="append", default=[], metavar="[NAME=]PATH", help="a model, as a student; repeatable")
    add("--teacher", action="append", default=[], metavar="[NAME=]PATH", help="a model, as a teacher; repeatable")
    add("--tasks", nargs="+", default=[LIKELIHOOD], metavar="TASK", help="likelihood, a benchmark, a task of lm-eval")
    add("--out", help="folder for answers, sample by sample [MODEL/evaluation]")
    add("--json", metavar="FILE", help="also write everything as JSON")
    add("--card", action="store_true", help="also write the scores of each release into its model card")
    add("--seed", type=int, default=0, help="of masks, sampling and bootstrap [0]")
    add("--batch-size", type=int, default=8, help="samples at once; changes speed only [8]")
    add("--dtype", choices=("bfloat16", "float32"), default="float32", help="precision [float32]")
    add("--device", default="auto", help=DEVICE_HELP)

    bound = parser.add_argument_group("likelihood")
    bound.add_argument("--data", help="prepared folder that no model was trained on")
    bound.add_argument(
        "--teacher-context",
        choices=("staircase", "full", "block_causal"),
        default="staircase",
        help="what teachers attend to; the staircase gives them what students see [staircase]",
    )
    bound.add_argument("--samples", type=int, default=0, help="of the data, spread evenly over it [all]")
    bound.add_argument(
        "--mc-samples", type=int, default=8, help="timesteps per sample, one in each of as many strata [8]"
    )

    put = parser.add_argument_group("benchmarks").add_argument
    put("--preset", choices=("paper",), default="paper", help="settings of each benchmark [paper]")
    put("--limit", type=int, default=0, help="only so many samples of each task, for a look [all]")
    put("--max-new-tokens", type=int, dest="new_tokens", help="longest answer [the preset's: 256 or 3]")
    put("--steps", type=int, help="passes for a whole answer [one a token]")
    put("--few-shot", type=int, help="examples in a prompt [the preset's: none; bbh 3]")
    put("--temperature", type=float, help="0 takes the likeliest token [0]")
    put("--no-chat-template", action="store_false", default=None, dest="chat_template", help="plain text")
    put("--samples-per-problem", type=int, default=1, help="of HumanEval or MBPP, for pass@10 and pass@100 [1]")
    put("--include-path", action="append", default=[], metavar="FOLDER", help="further tasks of lm-eval")
    put("--workers", type=int, default=0, help="programs run at a time [one a core]")
    put("--unsafe-programs", action="store_true", help="run programs even where this machine cannot hold them")
    arguments = parser.parse_args(argv)
    if not (arguments.model or arguments.student or arguments.teacher):
        parser.error("give at least one model")
    return arguments


def main(argv: list[str]) -> int:
    arguments = arguments_of(argv)
    models = [named(text) for text in (*arguments.model, *arguments.student, *arguments.teacher)]
    names = [name for name, _ in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {twice[0]!r}; tell them apart with NAME=PATH")
    from megatron_tide.release import card_scores, has_card, write_scores

    cards = [path for _, path in models if arguments.card and has_card(path)]
    if arguments.card and not cards:
        raise ValueError("--card: none of these models is a release with a card; tools/convert_to_hf.py makes one")
    tasks = list(dict.fromkeys(arguments.tasks))
    content = compare_likelihoods(arguments) if LIKELIHOOD in tasks else {}
    benchmarks = [task for task in tasks if task != LIKELIHOOD]
    if benchmarks:
        content["benchmarks"] = run_benchmarks(arguments, benchmarks, models)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in cards:
        write_scores(path, card_scores(content, path))
    return 0


def named(text: str) -> tuple[str, str]:
    """``NAME=PATH`` or ``PATH`` -> (name, path)."""
    name, equals, path = text.partition("=")
    return (name, path) if equals else (Path(text).name, text)


def compare_likelihoods(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table of likelihoods; returns what it says, for programs."""
    if not arguments.data:
        raise ValueError("likelihood is measured on held-out data: add --data, a prepared folder, or choose --tasks")
    from megatron_tide.data import PreparedData
    from megatron_tide.evaluate.comparison import (
        LikelihoodSettings,
        check_has_bound,
        likelihood_record,
        likelihood_table,
        measure_model,
    )
    from megatron_tide.models import DTYPES
    from megatron_tide.training_checkpoint import open_model

    data = PreparedData.open(arguments.data)
    how = LikelihoodSettings(
        data=data,
        teacher_context=arguments.teacher_context,
        samples=arguments.samples,
        mc_samples=arguments.mc_samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        dtype=DTYPES[arguments.dtype],
        device=device_of(arguments.device),
    )
    models: list[tuple[str, str | None]] = [(text, None) for text in arguments.model]
    models += [(text, "student") for text in arguments.student]
    models += [(text, "teacher") for text in arguments.teacher]
    for text in arguments.model:
        check_has_bound(named(text)[1])
    rows = [measure_model(*named(text), role, how, open_model) for text, role in models]
    print(likelihood_table(rows))
    return likelihood_record(rows, how)


def run_benchmarks(arguments: argparse.Namespace, names: list[str], models: list[tuple[str, str]]) -> list[Any]:
    """Print the table of benchmarks; returns what it says, for programs."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' minor bars, before they are imported
    from megatron_tide.evaluate.benchmark_presets import changed_preset
    from megatron_tide.evaluate.harness import EvalContext, benchmark_table, check_benchmarks, run_benchmark
    from megatron_tide.lock import RunLock
    from megatron_tide.models import DTYPES
    from megatron_tide.training_checkpoint import open_model

    changed = ("new_tokens", "steps", "few_shot", "temperature", "chat_template")
    changes = {name: getattr(arguments, name) for name in changed}
    presets = {name: changed_preset(name, arguments.preset, changes) for name in names}
    check_benchmarks(
        presets,
        samples_per_problem=arguments.samples_per_problem,
        unsafe_programs=arguments.unsafe_programs,
        include=arguments.include_path,
    )
    from megatron_tide.evaluate.generators import open_generator  # imports lm-eval

    folders = [results_folder(name, path, arguments.out) for name, path in models]
    results = []
    for (name, path), folder in zip(models, folders):
        dtype, device = DTYPES[arguments.dtype], device_of(arguments.device)
        context = EvalContext(
            name=name,
            path=path,
            generator=open_generator(path, dtype, device, open_model, arguments.batch_size),
            folder=folder,
            seed=arguments.seed,
            limit=arguments.limit,
            samples_per_problem=arguments.samples_per_problem,
            workers=arguments.workers,
            unsafe_programs=arguments.unsafe_programs,
            include=arguments.include_path,
        )
        with RunLock(folder):
            results += [run_benchmark(task, preset, context) for task, preset in presets.items()]
    print(benchmark_table(results))
    return [result.to_dict() for result in results]


def results_folder(name: str, path: str, out: str | None) -> Path:
    """Where a model's answers are kept: below ``--out``, or in the model's own folder."""
    if out:
        return Path(out) / name
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no folder here to keep answers in; add --out FOLDER")
    return Path(path) / "evaluation"


if __name__ == "__main__":
    cli.run(main)
