"""Two tokenizers -> chunks: byte tables, alignment and the bridge on disk. Numpy, without torch."""

from megatron_tide.bridge.align import TEXTS_AT_ONCE, align, align_batch, align_lengths
from megatron_tide.bridge.artifact import Aligned, Bridge, EncodedPair, align_text, align_texts
from megatron_tide.bridge.chat import SPOKEN, LeftOut
from megatron_tide.bridge.loading import load_tokenizer
from megatron_tide.bridge.template import TemplateLimit
from megatron_tide.bridge.tokenizer import Encoding, TextTokenizer

__all__ = [
    "SPOKEN",
    "TEXTS_AT_ONCE",
    "Aligned",
    "Bridge",
    "EncodedPair",
    "Encoding",
    "LeftOut",
    "TemplateLimit",
    "TextTokenizer",
    "align",
    "align_batch",
    "align_lengths",
    "align_text",
    "align_texts",
    "load_tokenizer",
]
