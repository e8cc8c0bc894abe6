"""Small real tokenizers for tests: the quickstart's own trainers, on a few texts."""

from megatron_tide.bridge.train_tokenizers import train_byte_bpe, train_sentencepiece

__all__ = ["TEXTS", "train_byte_bpe", "train_sentencepiece"]

TEXTS = [
    'def add(left, right):\n    """Return the sum of two numbers."""\n    return left + right\n',
    "for name in names:\n    if name.startswith('_'):\n        continue\n    print(name, len(name))\n",
    "class Counter:\n    def __init__(self):\n        self.count = 0\n\n    def more(self):\n        self.count += 1\n",
    "The quick brown fox jumps over the lazy dog. The dog does not mind; the fox does it again and again.",
    "Write a function that returns the largest number of a list, or None if the list is empty.",
    "Größe, déjà vu, naïve: words with accents. 世界 and мир are two more.",
] * 8
