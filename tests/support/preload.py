"""Imported once, in the process that ranks of tests are forked from: they start in no time, and start nothing else.

One thread a rank: the number is read when torch is imported.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - every engine imports it, and it torch's compiler
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import megatron_tide.evaluate
import megatron_tide.train.build  # noqa: F401
