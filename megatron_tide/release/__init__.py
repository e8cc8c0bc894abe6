"""Checkpoint -> a folder that needs transformers only, with proof that it is the same model."""

from megatron_tide.release.convert import Options, convert
from megatron_tide.release.export import parse_size
from megatron_tide.release.push import Hub
from megatron_tide.release.scores import Score, card_scores, has_card, write_scores

__all__ = [
    "Hub",
    "Options",
    "Score",
    "card_scores",
    "convert",
    "has_card",
    "parse_size",
    "write_scores",
]
