"""Checkpoint -> a folder that needs transformers only, with proof that it is the same model."""

from megatron_tide.release.card import Score, card_scores, has_card, write_scores
from megatron_tide.release.convert import Hub, Options, convert, parse_size

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
