"""megatron_tide: distil a large diffusion language model into a small one.

The packages are the data flow, in order: ``bridge`` (two tokenizers -> chunks), ``data`` (text -> batches),
``diffusion`` (clean -> noised), ``models`` (noised -> log-probs), ``objectives`` (log-probs -> loss), ``hosting``
(where the teacher lives), ``train`` (loss -> checkpoints), ``generate``, ``evaluate`` and ``release`` (checkpoint ->
text, scores, a Hugging Face folder).
"""

__version__ = "0.1.0"
