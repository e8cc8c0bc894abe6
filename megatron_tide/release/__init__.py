"""Checkpoint -> a folder that needs transformers only, with proof that it is the same model."""

from megatron_tide.release.convert import Options, convert
from megatron_tide.release.export import DTYPES, parse_size
from megatron_tide.release.push import Hub
from megatron_tide.release.scores import Score, card_scores, has_card, write_scores
from megatron_tide.release.trained import Opened, Trained, open_model, open_trained

__all__ = [
    "DTYPES",
    "Hub",
    "Opened",
    "Options",
    "Score",
    "Trained",
    "card_scores",
    "convert",
    "has_card",
    "open_model",
    "open_trained",
    "parse_size",
    "write_scores",
]
