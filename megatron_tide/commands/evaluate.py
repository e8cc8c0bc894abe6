"""Evaluate models: held-out likelihood, and benchmarks next to the published numbers.

MODEL is a folder in hub format, a hub name, or a training checkpoint (for a run folder, its newest step), given as
PATH or NAME=PATH. Students and diffusion teachers decode block by block; any causal language model of transformers can
be an autoregressive baseline. Intervals are 95 % bootstrap.

--tasks likelihood (the default) measures the diffusion bound on --data in bits per byte, with the same masks for every
model: students are scored on the student's tokens of prepared data and teachers on the teacher's, so that all predict
the same bytes from the same bytes. Differences are paired, to each --baseline. --likelihood-noise block estimates the
same bound with less variance; student and teacher then have different masks, and teachers need the staircase.
--completions N also completes N of the prompts, greedily and one token per pass, and counts those that parse as Python
and say something: 40 characters or more, no line three times. Of an answer with a code fence, what is inside the first
one counts. No completion is run. --teacher-context causal scores an autoregressive model, named with --teacher; it
writes from left to right.

Benchmarks (gsm8k math bbh mmlu_pro hellaswag mmlu humaneval mbpp, and any task of lm-eval) run with the paper's
settings; other tasks keep their own number of tokens. They need requirements-eval.txt. <think>...</think> (or another
model's marks) is no part of an answer: stop strings count only after it, and an answer that is all thoughts is empty.
Programs of humaneval and mbpp can import the standard library and every installed package. Answers are cached in --out:
a stopped evaluation, run again by the same user, continues; answers and verdicts that come with a downloaded folder are
not used. --thresholds measures scores and tokens per forward pass at each, and the area under that curve (AUP).

Examples:
  python -m megatron_tide evaluate runs/quickstart/hf --tasks humaneval --thresholds 0.6 0.8 0.9 1 --json scores.json
  python -m megatron_tide evaluate student=runs/x/hf teacher=inclusionAI/LLaDA2.0-mini ar=Qwen/Qwen3-0.6B \\
      --out runs/scores --tasks gsm8k math bbh mmlu_pro hellaswag mmlu humaneval mbpp --dtype bfloat16
  python -m megatron_tide evaluate runs/quickstart/hf --data my.jsonl
  python -m megatron_tide evaluate --data runs/quickstart/test-data --teacher runs/quickstart/teacher \\
      --student start=runs/quickstart/student --student tide-cross=runs/quickstart/tide-cross --completions 50
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tide.choices import ATTENTION_LAYOUTS, BLOCK_LAYOUTS, LIKELIHOOD_NOISE
from megatron_tide.cli import check_model_path, flag, say
from megatron_tide.commands import dtype_flag, refuse_unused
from megatron_tide.files import atomic_write
from megatron_tide.machine import DEVICE_HELP, devices_of

if TYPE_CHECKING:
    from megatron_tide.data import PreparedData
    from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
    from megatron_tide.evaluate.comparison import LikelihoodSettings

LIKELIHOOD = "likelihood"
ON_GPU, ON_CPU = {"batch_size": 64, "dtype": "bfloat16"}, {"batch_size": 8, "dtype": "float32"}


@dataclass(frozen=True, kw_only=True)
class LikelihoodArgs:
    """Likelihood."""

    data: Path | None = flag(
        None,
        "Data that no model was trained on: a folder made by prepare, or text (.jsonl, .parquet, a mixture .json, a "
        "folder), which is prepared for these models in a temporary folder",
        metavar="DATA",
        reads="any",
    )
    teacher_context: str = flag(
        "staircase", "Attention mask of teachers; staircase: same as students", choices=ATTENTION_LAYOUTS
    )
    samples: int = flag(0, "Number of samples, spread evenly over the data", shown="all", low=0)
    mc_samples: int = flag(8, "Number of Monte Carlo timesteps per sample or block (stratified)", low=1, high=1 << 16)
    likelihood_noise: str = flag(
        "sample", f"Timesteps and masks of the bound. {LIKELIHOOD_NOISE}", choices=LIKELIHOOD_NOISE
    )
    baseline: tuple[str, ...] = flag(
        (),
        "Name of a model to compare the others with; repeatable",
        shown="the first student",
        metavar="NAME",
        kind="repeated",
    )
    completions: int = flag(0, "Number of prompts of --data to complete and judge as code", low=0)
    completion_tokens: int = flag(96, "Maximum number of tokens per completion", low=1, high=1 << 24)
    completion_min_tokens: int = flag(0, "Minimum number of tokens per completion", low=0, high=1 << 24)
    completion_eos_in_order: bool = flag(
        False, "Decide end of text only at the first open position of a block, as in generate"
    )
    per_sample: bool = flag(False, "Also write the nats and bytes of each sample to --json")


@dataclass(frozen=True, kw_only=True)
class BenchmarkArgs:
    """Benchmarks."""

    preset: str = flag("paper", "Settings of each benchmark", choices=("paper",))
    limit: int = flag(0, "Maximum number of samples per task", shown="all", low=0)
    max_new_tokens: int | None = flag(
        None,
        "Maximum number of tokens per answer",
        shown="256; multiple choice 3; others: their own",
        low=1,
        high=1 << 24,
    )
    steps: int | None = flag(None, "Number of forward passes per answer", shown="one per token", low=1)
    thresholds: tuple[float, ...] = flag(
        (),
        "Thresholds of decoding to run each benchmark at, for quality against speed",
        shown="1",
        metavar="P",
        low=0,
        high=1,
    )
    few_shot: int | None = flag(None, "Number of examples in the prompt", shown="0; bbh 3", low=0, high=1000)
    temperature: float | None = flag(
        None, "Sampling temperature; 0 takes the most probable token", shown="0", low=0, high=1000
    )
    chat_template: bool | None = flag(None, "Render prompts with the tokenizer's chat template", shown="on")
    thinking: bool | None = flag(
        None,
        "Let models think before they answer, where their chat template knows enable_thinking",
        shown="off for autoregressive models; others as they were trained",
    )
    samples_per_problem: int = flag(
        1, "Number of answers per problem (humaneval, mbpp), for pass@10 and pass@100", low=1, high=10000
    )
    include_path: tuple[str, ...] = flag(
        (), "Folder of further lm-eval tasks; code that they name runs; repeatable", metavar="DIR", kind="repeated"
    )
    workers: int = flag(0, "Number of programs tested in parallel", shown="one per core", low=0)
    unsafe_programs: bool = flag(False, "Run programs written by a model even if this machine cannot sandbox them")


@dataclass(frozen=True, kw_only=True)
class Args:
    model: tuple[str, ...] = flag((), "Model to evaluate on all --tasks", kind="positional", metavar="[NAME=]MODEL")
    student: tuple[str, ...] = flag(
        (), "Model, scored as a student; repeatable", metavar="[NAME=]PATH", kind="repeated"
    )
    teacher: tuple[str, ...] = flag(
        (), "Model, scored as a teacher; repeatable", metavar="[NAME=]PATH", kind="repeated"
    )
    tasks: tuple[str, ...] = flag((LIKELIHOOD,), "Tasks: likelihood, benchmarks, or tasks of lm-eval", metavar="TASK")
    out: Path | None = flag(
        None, "Folder for cached answers and samples", metavar="DIR", shown="MODEL-evaluation, beside MODEL"
    )
    json: Path | None = flag(
        None,
        "Also write all results to this file, as JSON",
        metavar="FILE",
        writes="file",
        keys=("models", "benchmarks"),
    )
    card: bool = flag(False, "Also write the scores of each release into its model card")
    seed: int = flag(0, "Random seed for masks, sampling and bootstrap", low=0)
    block_layout: str | None = flag(
        None,
        f"Where blocks begin. {BLOCK_LAYOUTS}",
        choices=BLOCK_LAYOUTS,
        shown="the model's own, or answer for benchmarks, as published; sequence for --data",
    )
    batch_size: int | None = flag(
        None, "Number of samples per batch, for speed and memory only", low=1, shown="64 on a GPU, else 8"
    )
    dtype: str | None = dtype_flag()
    device: str = flag("auto", DEVICE_HELP)
    likelihood: LikelihoodArgs = field(default_factory=LikelihoodArgs)
    benchmarks: BenchmarkArgs = field(default_factory=BenchmarkArgs)


@dataclass(frozen=True)
class Where:
    """Where and how models run: given flags, else what suits the device. ``devices``: the first, and further GPUs."""

    devices: list[str]
    batch_size: int
    dtype: Any

    @classmethod
    def of(cls, args: Args) -> Where:
        from megatron_tide.models import DTYPES

        devices = devices_of(args.device)
        usual: dict[str, Any] = ON_GPU if devices[0].startswith("cuda") else ON_CPU
        return cls(devices, args.batch_size or usual["batch_size"], DTYPES[args.dtype or usual["dtype"]])


def run(args: Args) -> None:
    models = [_named(text) for text in (*args.model, *args.student, *args.teacher)]
    names = [name for name, _ in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not models:
        raise ValueError("give at least one model (see --help)")
    if twice:
        raise ValueError(f"two models have the name {twice[0]!r}; set names with NAME=PATH")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "15")  # seconds between lines of progress in a log
    unknown = [name for name in args.likelihood.baseline if name not in names]
    if unknown:
        raise ValueError(f"--baseline {unknown[0]}: no model has this name; choose of {', '.join(names)}")
    for _, path in models:
        check_model_path(path)
    tasks = list(dict.fromkeys(args.tasks))
    benchmarks = [task for task in tasks if task != LIKELIHOOD]
    _refuse_unused(args, benchmarks, LIKELIHOOD in tasks)
    if LIKELIHOOD in tasks and not args.likelihood.data:
        raise ValueError("likelihood needs held-out data: add --data, or choose other --tasks")
    presets = _presets(args, benchmarks) if benchmarks else {}
    folders = [_results_folder(name, path, args.out) for name, path in models] if benchmarks else []
    from megatron_tide.release import has_card

    cards = [path for _, path in models if args.card and has_card(path)]
    if args.card and not cards:
        raise ValueError("--card: none of these models is a release with a card; tools/convert_to_hf.py creates one")
    content = _likelihood(args) if LIKELIHOOD in tasks else {}
    if content and benchmarks:
        _keep(args, content, cards)  # before hours of benchmarks
    if benchmarks:
        content["benchmarks"] = _benchmarks(args, presets, models, folders)
    _keep(args, content, cards)


def _keep(args: Args, content: dict[str, Any], cards: list[str]) -> None:
    from megatron_tide.release import card_scores, write_scores

    if args.json:
        atomic_write(args.json, (json.dumps(content, indent=1) + "\n").encode())
    for path in cards:
        write_scores(path, card_scores(content, path))


def _refuse_unused(args: Args, benchmarks: list[str], likelihood: bool) -> None:
    """ValueError for a flag that nothing which is asked for uses."""
    scored = args.likelihood
    if not benchmarks:
        refuse_unused(args.benchmarks, "benchmarks: add --tasks, such as --tasks humaneval")
        refuse_unused(args, "benchmarks; the likelihood is written to --json", ["out"])
    if not likelihood:
        refuse_unused(scored, f"the likelihood: add {LIKELIHOOD} to --tasks")
    if not scored.completions:
        rule = [info.name for info in fields(scored) if info.name.startswith("completion_")]
        refuse_unused(scored, "completions: add --completions N", rule)
    if not args.json:
        refuse_unused(scored, "what --json FILE records: add that", ["per_sample"])
    if not (args.teacher or args.model):
        refuse_unused(scored, "teachers: name one with --teacher", ["teacher_context"])
    if args.benchmarks.chat_template is False:
        refuse_unused(args.benchmarks, "chat templates: leave out --no-chat-template", ["thinking"])


def _named(text: str) -> tuple[str, str]:
    """``NAME=PATH`` or ``PATH`` -> (name, path). A text with "=" is a path if it exists, or if a "/" comes first."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, path
    name = Path(text).name
    return (Path(text).resolve().name if name in ("", "..") else name), text


def _likelihood(args: Args) -> dict[str, Any]:
    """Print the table of likelihoods; returns its content, for --json."""
    assert args.likelihood.data
    from megatron_tide.commands.held_out import held_out
    from megatron_tide.evaluate import comparison, score_table

    roles = (("", args.model), ("student", args.student), ("teacher", args.teacher))
    models = [(*_named(text), role or None) for role, texts in roles for text in texts]
    for _, path, role in models:
        comparison.check_has_bound(path, role)
    with held_out(args.likelihood.data, [(path, role) for _, path, role in models]) as data:
        how = _likelihood_settings(args, data)
        rows = [comparison.measure_model(name, path, role, how) for name, path, role in models]
    record = comparison.likelihood_record(rows, how, str(args.likelihood.data))
    say(score_table.text_table(*score_table.score_table([score_table.score_cells(one) for one in record["models"]])))
    return record


def _likelihood_settings(args: Args, data: PreparedData) -> LikelihoodSettings:
    from megatron_tide.evaluate import comparison

    where = Where.of(args)
    return comparison.LikelihoodSettings(
        data=data,
        teacher_context=args.likelihood.teacher_context,
        samples=args.likelihood.samples,
        mc_samples=args.likelihood.mc_samples,
        noise=args.likelihood.likelihood_noise,
        seed=args.seed,
        batch_size=where.batch_size,
        dtype=where.dtype,
        device=where.devices[0],
        copies=tuple(where.devices[1:]),
        baselines=args.likelihood.baseline,
        completions=args.likelihood.completions,
        decoding={
            "max_new_tokens": args.likelihood.completion_tokens,
            "min_new_tokens": args.likelihood.completion_min_tokens,
            "eos_in_order": args.likelihood.completion_eos_in_order,
        },
        block_layout=args.block_layout or "sequence",
        per_sample=args.likelihood.per_sample,
    )


def _presets(args: Args, names: list[str]) -> dict[str, BenchmarkPreset]:
    """The benchmarks with their settings, checked before anything is measured, and before heavy imports."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # minor bars of libraries, before they are imported
    from megatron_tide.evaluate.benchmark_presets import changed_preset
    from megatron_tide.evaluate.harness import check_benchmarks
    from megatron_tide.evaluate.task_functions import PROGRAMS

    given = args.benchmarks
    changes = {name: getattr(given, name) for name in ("steps", "few_shot", "temperature", "chat_template")}
    changes |= {"new_tokens": given.max_new_tokens, "block_layout": args.block_layout}
    presets = {name: changed_preset(name, given.preset, changes) for name in names}
    if not any(preset.task in PROGRAMS for preset in presets.values()):
        refuse_unused(given, "tasks with programs (humaneval, mbpp)", ["workers", "unsafe_programs"])
    check_benchmarks(presets, **_shared(given))
    from megatron_tide.training_checkpoint import generation_of

    if all(generation_of(_named(text)[1]) == "autoregressive" for text in (*args.model, *args.student, *args.teacher)):
        refuse_unused(given, "models that decode in blocks", ["steps", "thresholds"])
        refuse_unused(args, "models that decode in blocks", ["block_layout"])
    return presets


def _shared(given: BenchmarkArgs) -> dict[str, Any]:
    return {name: getattr(given, name) for name in ("samples_per_problem", "unsafe_programs", "include_path")}


def _benchmarks(
    args: Args, presets: dict[str, BenchmarkPreset], models: list[tuple[str, str]], folders: list[Path]
) -> list[dict[str, Any]]:
    """Print the table of benchmarks; returns its content, for --json."""
    from megatron_tide.evaluate.benchmark_table import benchmark_table
    from megatron_tide.evaluate.generators import open_generator  # imports lm-eval
    from megatron_tide.evaluate.harness import EvalContext, run_benchmark
    from megatron_tide.evaluate.parallelism import at_thresholds
    from megatron_tide.lock import RunLock

    given = args.benchmarks
    results, where = [], Where.of(args)
    for (name, path), folder in zip(models, folders):
        context = EvalContext(
            name=name,
            path=path,
            generator=open_generator(
                path,
                where.dtype,
                where.devices[0],
                where.batch_size,
                given.thinking,
                where.devices[1:],
                args.block_layout,
            ),
            folder=folder,
            seed=args.seed,
            limit=given.limit,
            workers=given.workers,
            **_shared(given),
        )
        with RunLock(folder):
            for task, preset in presets.items():
                each = at_thresholds(preset, given.thresholds, context.generator.decoder)
                results += [run_benchmark(task, one, context) for one in each]
    say(benchmark_table(results))
    return [result.to_dict() for result in results]


def _results_folder(name: str, path: str, out: Path | None) -> Path:
    """The folder for a model's answers: below ``--out``, or beside the model's folder."""
    if out:
        return out / name
    if not Path(path).is_dir():
        raise ValueError(f"{path}: not a local folder, so answers cannot be cached beside it; add --out FOLDER")
    folder = Path(path).resolve()  # beside it: a folder that is converted again is replaced
    return folder.with_name(f"{folder.name}-evaluation")
