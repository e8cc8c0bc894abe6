"""A run -> a page: figures, tables and samples from what a run folder holds.

``reading`` opens the folder, ``figures`` and ``alignment`` draw, ``sections`` puts words and tables around them and
``page`` writes it down. ``footprint`` measures memory and speed of student against teacher, each by ``measure`` in a
process of its own.
"""
