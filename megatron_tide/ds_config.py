"""DeepSpeed configuration files: find, read and check them; and the ninja that DeepSpeed compiles with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatron_tide.bounds import shown
from megatron_tide.files import read_json

REPOSITORY = Path(__file__).resolve().parents[1]
# The run's own flags set these; setting them in two places would allow contradictions.
_OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler",
          "gradient_clipping", "bf16", "fp16")  # fmt: skip
# What decides memory, communication and logs alone, or is recorded (SUMS). Others may change what is trained, without a
# flag of the run and so without a trace in its records.
_ALLOWED = ("zero_optimization", "communication_data_type", "data_types", "aio", "pipeline", "activation_checkpointing",
            "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "comms_logger",
            "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level")  # fmt: skip
_CHANGING = ("zenflow", "load_from_fp32_weights", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
             "zero_quantized_gradients")  # fmt: skip
SUMS = ("communication_data_type", "data_types")
"""Keys that decide the precision of sums of gradients."""


def read_ds_config(path: str, flag: str) -> dict[str, Any]:
    """A ds_configs file, searched in the working folder and then in the repository; ``flag``: its flag, for messages.

    Raises:
        ValueError: missing, not JSON, or with a key that the run's own flags set.
    """
    found = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if found is None:
        raise ValueError(f"{flag} {path}: no such file; see ds_configs/ for those of the project")
    try:
        settings = read_json(found)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None
    owned = [key for key in _OWNED if key in settings]
    if owned:
        raise ValueError(f"{flag} {path}: remove {owned[0]!r}; the run's own flag sets it (see --help)")
    zero = section(settings, "zero_optimization", f"{flag} {path}")
    changing = [key for key in settings if key not in _ALLOWED] + [key for key in _CHANGING if key in zero]
    if changing:
        raise ValueError(
            f"{flag} {path}: remove {changing[0][:80]!r}; it may change what is trained, and no flag records it"
        )
    return settings


def use_own_ninja() -> None:
    """Let DeepSpeed find the ninja that is installed with this interpreter, before any other.

    Another version of ninja would restart the build, and every process would wait for it.
    """
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = own + os.pathsep + os.environ.get("PATH", os.defpath)


def section(settings: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A section of a DeepSpeed JSON that ``where`` names; {} if there is none, ValueError if it is not an object."""
    part = settings.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{where}: {name} is {shown(part)}; it must be an object, as in the files of ds_configs/")
    return part


def offload_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The ``offload_param`` section of a checked DeepSpeed JSON; {} if parameters stay on the device."""
    return (settings.get("zero_optimization") or {}).get("offload_param") or {}
