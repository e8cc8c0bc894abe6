"""Two tokenizers -> chunks: byte tables, alignment and the bridge artefact. Numpy, without torch."""

from megatron_tide.bridge.align import align, align_lengths
from megatron_tide.bridge.artefact import Aligned, Bridge, align_text
from megatron_tide.bridge.loading import load_tokenizer
from megatron_tide.bridge.tokenizer import Spelling, TextTokenizer

__all__ = ["Aligned", "Bridge", "Spelling", "TextTokenizer", "align", "align_lengths", "align_text", "load_tokenizer"]
