"""Write on-policy data for prepare: a student's answers to prompts of a corpus.

--samples rows of --data are drawn by (--seed, --round). The student writes the response of --share of them; the others
keep theirs. OUT/mixture.json names both. Any number of ranks writes the same files; a command that was stopped, run
again, answers the rest. recipes/on_policy.sh trains in such rounds.

Examples:
  python -m megatron_tide rollout runs/NAME/tide-cross --data corpus.jsonl --round 1 --samples 6400 --share 0.5 \\
      --student-length 512 --temperature 1 --out runs/NAME/round-1-answers
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 8 --rdzv-backend c10d --rdzv-conf store_type=file \\
      --local-addr 127.0.0.1 -m megatron_tide rollout runs/NAME/tide-cross --data corpus.jsonl ...
  python -m megatron_tide prepare --data runs/NAME/round-1-answers/mixture.json --student DIR --out DIR
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tide.cli import SEEDS, flag, say
from megatron_tide.commands import dtype_flag, mask_flag
from megatron_tide.commands.generate import RuleArgs
from megatron_tide.errors import EXIT_INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = flag(
        ...,
        "Student: release, hub-format folder, hub name, run folder or step folder",
        kind="positional",
        reads="model",
    )
    data: tuple[str, ...] = flag(..., "Data: mixture .json, .jsonl, .parquet, folder or hub name", metavar="DATA")
    out: Path = flag(..., "Folder to write", metavar="DIR")
    round: int = flag(1, "Number of the round; others draw other rows and other random numbers", **SEEDS)
    samples: int = flag(..., "Number of rows of the round", low=1, high=2**31)
    share: float = flag(1.0, "Share of the rows whose response the student writes", low=0, high=1)
    student_length: int = flag(
        ..., "Maximum number of tokens of prompt and answer: that of prepare", low=1, high=1 << 24
    )
    block_size: int | None = flag(None, "Block size to decode with", shown="that of the model", low=1, high=1 << 24)
    student_mask: str | None = mask_flag("student")
    as_written: bool = flag(
        False,
        "Keep the tokens of an answer and the pass that decided each, for prepare and distill --own-masks order; "
        "otherwise prepare tokenises its text again, which can give other tokens than the student wrote",
    )
    seed: int = flag(0, "Random seed", **SEEDS)
    batch_size: int = flag(32, "Number of prompts per batch", low=1, high=1 << 20)
    dtype: str | None = dtype_flag()
    trust_remote_code: bool = flag(False, "Run Python code that comes with a tokenizer")
    dry_run: bool = flag(False, "Check the data, print what would be done, and exit")
    rule: RuleArgs = field(default_factory=RuleArgs)


def run(args: Args) -> int:
    from megatron_tide.data.sources import open_mixture

    mixture = open_mixture(args.data)
    if args.samples > len(mixture):
        raise ValueError(f"--samples {args.samples}: the data have {len(mixture)} rows; use fewer")
    if args.dry_run:
        own = round(args.share * args.samples)
        say(f"dry run: {args.samples} of {len(mixture)} rows, {own} of them to be answered: OK")
        return 0
    from megatron_tide.train.watchdog import group_for_a_run

    with group_for_a_run() as world:
        return _answer(args, mixture, world)


def _answer(args: Args, mixture: Any, world: Any) -> int:
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.generate.identity import code, identity
    from megatron_tide.generate.prompts import tell_changes
    from megatron_tide.generate.rollouts import Rollouts, draw_round
    from megatron_tide.lock import locked
    from megatron_tide.models import DTYPES
    from megatron_tide.models.families import family_of
    from megatron_tide.models.load import stated_layout
    from megatron_tide.train.loop import StopRequest
    from megatron_tide.training_checkpoint import open_model

    stop = StopRequest()
    stop.install()
    dtype = args.dtype or ("bfloat16" if world.device.type == "cuda" else "float32")
    opened = world.on_all(lambda: open_model(args.model, DTYPES[dtype], world.device))
    if family_of(opened.model).generation != "block_diffusion":
        raise ValueError(f"{args.model}: an autoregressive model; make a student of it with init-model --from")
    tokenizer = load_tokenizer(opened.folder, mask_token=args.student_mask, trust_remote_code=args.trust_remote_code)
    block = args.block_size or opened.model.config.block_size
    drawn = draw_round(
        mixture,
        tokenizer,
        number=args.round,
        seed=args.seed,
        samples=args.samples,
        share=args.share,
        longest=args.student_length - block,
    )
    if world.is_main:
        tell_changes(drawn.prompts)
    layout = args.rule.block_layout or stated_layout(opened.folder) or "sequence"
    options = {**dataclasses.asdict(args.rule), "block_layout": layout, "block_size": block}
    decides = [identity(opened.model, opened.folder, tokenizer), code(), dtype, options, args.student_length]
    rollouts = Rollouts(
        args.out, tokenizer, drawn, args.student_length, args.batch_size, decides, options, args.as_written
    )
    with locked(args.out, world):
        done = rollouts.answer(opened.model, world, lambda: bool(stop.signal))
    if not done:
        world.print_rank0(f"stopped on request; run the same command again to continue ({args.out})")
        return EXIT_INTERRUPTED
    if world.is_main:
        say(_summary(args.out))
    return 0


def _summary(out: Path) -> str:
    from megatron_tide.files import read_json
    from megatron_tide.generate.rollouts import SUMMARY, counted

    found = read_json(out / SUMMARY)
    rate = found["now"]["tokens"] / max(found["now"]["seconds"], 1e-9)
    return (
        f"finished: {found['own']} answers of {found['tokens']:,} tokens ({found['finished']} ended, "
        f"{found['empty']} empty), {found['corpus']} rows of the corpus; {counted(found['passed'])}; {rate:,.0f} "
        f"tokens/s ({out})"
    )
