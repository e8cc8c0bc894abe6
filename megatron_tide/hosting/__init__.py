"""Where the teacher lives. Every backend has ``score(microbatches) -> outputs`` and gives the same numbers.

``replicated``: complete, on every rank. ``zero3``: a share of every layer on each rank. ``pipeline``: some layers on
each. ``settings`` reads what the flags name and ``place`` builds it. ``flat_layers`` and ``layerwise`` are shared by
the last two. ``plan`` predicts what each takes; its ``check`` runs before a run starts.
"""
