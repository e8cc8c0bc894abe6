"""Caches filled by this process alone, and runs that read their answers."""

from __future__ import annotations

import torch

from megatron_tide.commands import cache as cache_command
from megatron_tide.config import from_flat
from megatron_tide.train import fill_cache as filling
from megatron_tide.train.build import make_loader
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.inputs import read_run_inputs
from megatron_tide.train.loop import StopRequest

WORLD = DistContext(rank=0, size=1, device=torch.device("cpu"), host_group=None)
# All that makes a question: both CompDemo passes, timesteps per block, strata of the global batch; and all answers.
NOISE = {"timesteps": "block", "timestep_sampling": "stratified", "mask_count": "exact", "compdemo_split": "exact"}
ASKS = {"strategy": "tide-bridge", "teacher_context": "staircase", "masking": "synchronous", "max_steps": 8, **NOISE}


def filled(chain, out, stop=None, seeds=(42,), steps_per_forward=1, **flags):
    """The manifest of a cache filled by this process alone, as the command makes it; and its forecast."""
    config = from_flat(chain.run(out, **{**ASKS, **flags}))
    inputs = read_run_inputs(config, 1)
    loader = make_loader(config, inputs, WORLD)
    expected = filling.forecast(config, inputs, loader, len(seeds), cache_command.Rates())
    options = {"seeds": seeds, "steps_per_forward": steps_per_forward, "stop": stop or StopRequest()}
    return filling.fill_cache(config, inputs, loader, WORLD, expected, **options), expected


def reading(chain, folder, **flags):
    """(inputs, loader) of a run that reads ``folder``, without a teacher's folder."""
    cached = {"teacher_hosting": "cached", "teacher_cache": str(folder), "teacher": ""}
    config = from_flat(chain.run(folder.parent / "run", **{**ASKS, **cached, **flags}))
    config.check()
    inputs = read_run_inputs(config, 1)
    return inputs, make_loader(config, inputs, WORLD)
