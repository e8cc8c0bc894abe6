"""lm-eval's tasks asked of our models: the run of one benchmark, task or group.

lm-eval (an optional extra) brings prompts, filters and metrics; answers come from ``Asking``, sample by sample on disk.
Its own bootstrap is left out for ours, over the samples of all subtasks together. Programs of MBPP are never run by it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_tide.evaluate.asking import Asking, Score, mean
from megatron_tide.evaluate.humaneval import judge
from megatron_tide.evaluate.lm_tasks import mbpp
from megatron_tide.evaluate.presets import Preset
from megatron_tide.evaluate.store import Store
from megatron_tide.sandbox import require_sandbox

OUR_TASKS = Path(__file__).with_name("lm_tasks")
# Tasks whose answers are programs: (sample's row, code) -> parts for the sandbox.
PROGRAMS: dict[str, Callable[[dict[str, Any], str], list[str]]] = {"mbpp_instruct_sandboxed": mbpp.program_of}


def check_lm_task(preset: Preset, include: Sequence[str] = ()) -> None:
    """Raises: ValueError, where lm-eval is not installed or nobody knows the task."""
    _manager(preset, include)


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("this task needs lm-eval: pip install -r requirements-eval.txt")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def lm_task(asking: Asking, preset: Preset, include: Sequence[str] = ()) -> list[Score]:
    """Every (metric, filter) of one task or group, over all its samples; ``include``: folders of further tasks.

    Raises:
        ValueError: no lm-eval, no such task, data that cannot be had, or a task that does not generate.
    """
    manager = _manager(preset, include)
    if preset.task in PROGRAMS:
        require_sandbox(asking.unsafe_programs)
    from lm_eval import evaluate

    from megatron_tide.evaluate.lm_model import TideLM  # it is a model of lm-eval's, which is an optional extra

    store = asking.store(preset.task, preset)
    try:
        loaded = manager.load([preset.task])
        for task in loaded["tasks"].values():
            if preset.few_shot is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=preset.few_shot or 0)
            task.set_fewshot_seed(seed=asking.seed)
        results = evaluate(
            TideLM(asking, preset, store),
            loaded,
            limit=asking.limit or None,
            bootstrap_iters=0,
            apply_chat_template=preset.chat_template,
            fewshot_as_multiturn=preset.chat_template,
        )
    except (OSError, ImportError) as error:  # data sets that cannot be downloaded, packages that a task needs
        raise ValueError(f"task {preset.task}: {' '.join(str(error).split())[:300]}") from None
    assert results is not None
    samples = [sample for task in results["samples"].values() for sample in task]
    if preset.task in PROGRAMS:
        return [_passed(asking, preset, store, samples)]
    return _scores(samples, asking.seed)


def _manager(preset: Preset, include: Sequence[str]) -> Any:
    """lm-eval's index of the tasks in question; of all its tasks, which takes long, only for a name unknown so far."""
    _require_lm_eval()
    import lm_eval.tasks

    for folder in include:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder of tasks")
    theirs = Path(lm_eval.tasks.__file__).parent
    # Later folders win, so a user's task of the same name stands for lm-eval's.
    folders = [*(theirs / name for name in preset.folders), OUR_TASKS, *include]
    for everything in (False, True):
        manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=everything)
        if preset.task in manager.all_tasks:
            return manager
    raise ValueError(f"task {preset.task!r}: neither a benchmark of ours nor one that lm-eval knows")


def _scores(samples: list[dict[str, Any]], seed: int) -> list[Score]:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (int, float)):  # some metrics are no number a sample
                values[metric, sample["filter"]].append(float(sample[metric]))
    return [Score(metric, name, mean(found, seed), len(found)) for (metric, name), found in values.items()]


def _passed(asking: Asking, preset: Preset, store: Store, samples: list[dict[str, Any]]) -> Score:
    keys = [f"{preset.task}/{sample['doc_id']}" for sample in samples]
    programs = [PROGRAMS[preset.task](sample["doc"], sample["filtered_resps"][0][0]) for sample in samples]
    passed = judge(preset.task, store, keys, programs, asking)
    return Score("pass@1", samples[0]["filter"], mean(passed, asking.seed), len(passed))
