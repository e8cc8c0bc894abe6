"""Log-probs -> loss: denoising, next token, chunks, distributions, TIDAL, and the strategies made of them.

``chunk`` compares one number per chunk, for any tokenizers; ``distribution`` compares full distributions where a chunk
is one token on both sides; ``tidal`` gives the strength; ``table`` combines them by name; a training step
calls ``strategy``. To add an objective: write ``term(student, target)`` in ``chunk`` (or ``rows`` in
``distribution``) and its line in ``choices``.
"""

from megatron_tide.choices import CHUNK_OBJECTIVES, DISTRIBUTION_OBJECTIVES, STRATEGIES, StrategySpec
from megatron_tide.objectives.chunk import chunk_loss
from megatron_tide.objectives.distribution import VocabMap
from megatron_tide.objectives.outputs import Counts, StudentScores, TeacherOutputs
from megatron_tide.objectives.own import denoise_loss, next_token_loss
from megatron_tide.objectives.strategy import Strategy
from megatron_tide.objectives.table import build_strategy
from megatron_tide.objectives.tidal import tidal_kl, tidal_strength

__all__ = [
    "CHUNK_OBJECTIVES",
    "DISTRIBUTION_OBJECTIVES",
    "STRATEGIES",
    "Counts",
    "Strategy",
    "StrategySpec",
    "StudentScores",
    "TeacherOutputs",
    "VocabMap",
    "build_strategy",
    "chunk_loss",
    "denoise_loss",
    "next_token_loss",
    "tidal_kl",
    "tidal_strength",
]
