"""Checkpoint -> a folder that needs transformers only, with proof that it is the same model."""

from megatron_tide.release.convert import Options, convert
from megatron_tide.release.export import DTYPES, parse_size
from megatron_tide.release.trained import Trained, is_checkpoint, open_trained

__all__ = ["DTYPES", "Options", "Trained", "convert", "is_checkpoint", "open_trained", "parse_size"]
