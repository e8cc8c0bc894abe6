"""Checkpoint -> a folder that needs transformers only, with proof that it is the same model."""

from megatron_tide.release.convert import Options, convert
from megatron_tide.release.export import DTYPES, parse_size
from megatron_tide.release.push import Hub
from megatron_tide.release.scores import Score, card_scores, has_card, write_scores
from megatron_tide.release.training_checkpoint import Opened, TrainingCheckpoint, open_checkpoint, open_model

__all__ = [
    "DTYPES",
    "Hub",
    "Opened",
    "Options",
    "Score",
    "TrainingCheckpoint",
    "card_scores",
    "convert",
    "has_card",
    "open_checkpoint",
    "open_model",
    "parse_size",
    "write_scores",
]
