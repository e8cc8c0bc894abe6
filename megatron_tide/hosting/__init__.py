"""Where the teacher lives. Every host has one method, ``score(window) -> answers``, and gives the same numbers.

``resident``: whole, on every rank. ``zero3``: a share of every unit on each rank. ``pipeline``: some layers on each.
``settings`` reads what the knobs name and ``place`` builds it. ``units`` and ``sweep`` are what the last two have in
common. ``plan`` says what each takes, and its ``check`` is asked before a run starts.
"""
