"""The DeepSpeed engine of the student: ds_configs JSON + the run's flags -> engine; ZeRO state by parameter name.

ds_configs set memory and communication. Batch sizes, learning rate and precision come from the run's flags and are
filled in here, so that each is defined once.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from megatron_tide.bounds import shown
from megatron_tide.choices import OPTIMIZERS
from megatron_tide.config import DistillConfig
from megatron_tide.ds_config import read_ds_config, section
from megatron_tide.fast import is_on
from megatron_tide.train.distributed import DistContext


def student_ds_config(path: str) -> dict[str, Any]:
    """Read a ds_configs file for the student.

    Raises:
        ValueError: as ``read_ds_config``, or for a ZeRO stage that the student cannot use.
    """
    settings = read_ds_config(path, "--deepspeed")
    stage = section(settings, "zero_optimization", f"--deepspeed {path}").get("stage", 0)
    if stage not in (1, 2):
        raise ValueError(f"--deepspeed {path}: zero_optimization.stage is {shown(stage)}; use 1 or 2 for the student")
    return settings


def engine_settings(config: DistillConfig, world_size: int, fused: bool = False) -> dict[str, Any]:
    """The complete DeepSpeed configuration of the student; ``fused``: with torch's fused AdamW."""
    train = config.train
    settings = student_ds_config(train.deepspeed)
    offloads = "offload_optimizer" in settings["zero_optimization"]
    settings |= {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * world_size),
        "gradient_clipping": train.max_grad_norm,
        # Its other way clears gradients in hooks of the engine's own forward, which is never called here: the first
        # micro-batch of a step would count as often as there are micro-batches.
        "bf16": {"enabled": train.precision == "bf16", "immediate_grad_update": True},
        "steps_per_print": 10**12,
        **OPTIMIZERS[train.optimizer].deepspeed(train, offloads, fused),
    }
    if train.precision == "fp32":  # the fp32 path has no separate accumulation type
        settings.pop("data_types", None)
        settings.pop("communication_data_type", None)
    return settings


def build_engine(model: nn.Module, config: DistillConfig, world: DistContext) -> Any:
    """A DeepSpeed engine over ``model``; the fp32 weights become the master weights without rounding."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    exact = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer, fused = OPTIMIZERS[config.train.optimizer], world.device.type == "cuda" and is_on("adam")
    groups, settings = optimizer.groups(model, config.train), engine_settings(config, world.size, fused)
    client = optimizer.client(config.train, "offload_optimizer" in settings["zero_optimization"], fused)
    if "offload_optimizer" in settings["zero_optimization"] and world.device.type == "cuda":
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
        engine, *_ = deepspeed.initialize(model=model, optimizer=client, model_parameters=groups, config=settings)
    for name, parameter in trained_parameters(engine):  # DeepSpeed made its master weights from rounded weights
        safe_set_full_fp32_param(parameter, exact[name].to(parameter.device))
    _set_state(engine, optimizer.state)
    return engine


def share_cores(local_ranks: int) -> None:
    """Give this rank its share of the cores for CPU Adam: torchrun gives each rank one thread, if nobody says more."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        threads = max(1, len(os.sched_getaffinity(0)) // local_ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the OpenMP of a compiled op, if it has its own
        torch.set_num_threads(threads)


def skipped(engine: Any) -> bool:
    """Whether the last optimizer step was skipped because the global gradient norm was not finite."""
    return bool(engine.optimizer.overflow)


def set_learning_rates(engine: Any, at_step: Callable[[float], float]) -> None:
    """Set each group's learning rate to ``at_step`` of its peak: a pure function, so there is no state to save."""
    for group in engine.optimizer.param_groups:
        group["lr"] = at_step(group["initial_lr"])


# --- ZeRO's partitioned state, by parameter name: what a checkpoint holds, at any world size and stage ---


def trained_parameters(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters in the model's own order; a tied weight comes once."""
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def full_master_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The full fp32 weight, gathered from all ranks (a collective)."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def full_moment(parameter: nn.Parameter, moment: str) -> torch.Tensor:
    """A full fp32 moment of the optimizer, gathered from all ranks (a collective)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, moment)


def moments(engine: Any) -> dict[str, set[str]]:
    """Names of the optimizer's moments, and of the parameters that have each."""
    found: dict[str, set[str]] = {}
    for group in engine.optimizer.optimizer.param_groups:
        for moment in group["moments"]:
            found.setdefault(moment, set()).update(group["names"])
    return found


def restore_state(engine: Any, weights: Any, stored_moments: dict[str, Any], steps_taken: int) -> None:
    """Put a checkpoint's tensors back into this rank's partitions; ``weights[name]`` yields a full fp32 tensor."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    state, having = engine.optimizer.optimizer.state, moments(engine)
    for values in state.values():
        if "step" in values:
            values["step"] = _step(values["step"], steps_taken)
    for name, parameter in trained_parameters(engine):
        value = weights[name].to(parameter.device)
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
        for moment, stored in stored_moments.items():
            if name in having[moment]:
                safe_set_full_optimizer_state(parameter, stored[name].to(parameter.device), moment)


def _step(old: Any, steps_taken: int) -> Any:
    """A step count of the same type: torch's Adam counts in a tensor, DeepSpeed's CPU Adam in an int."""
    return torch.full_like(old, steps_taken) if isinstance(old, torch.Tensor) else steps_taken


def _set_state(engine: Any, state_of: Callable[[Any, dict[str, Any], torch.Tensor], dict[str, Any]]) -> None:
    """Create the state of each flat parameter of the optimizer before the first step, and link it in DeepSpeed.

    By default an optimizer creates it at its first step, and DeepSpeed links it to parameters after the first parameter
    group has stepped: the later groups' does not exist then and can never be read or set by parameter.
    """
    zero, optimizer = engine.optimizer, engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for flat in group["params"]:
            optimizer.state[flat] = state_of(optimizer, group, flat)
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
