"""Where the teacher's weights are. Every backend has one method, ``score(microbatches)``, and returns the same numbers.

``backend``: the interface. ``replicated``: a full copy per rank. ``layerwise``: a teacher as flat layers, run layer by
layer; ``zero3`` shards them, ``pipeline`` spreads them over ranks. ``cached``: outputs from disk. ``build``: from the
flags to a backend. ``plan``: the memory of each; the trainer checks it before a run starts.
"""
