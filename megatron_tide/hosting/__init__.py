"""Where the teacher lives. Every host has one method, ``score(window) -> answers``, and gives the same numbers.

``resident``: whole, on every rank. ``zero3``: a share of every unit on each rank. ``pipeline``: some layers on each.
``place`` builds the one that the knobs name. ``units`` and ``sweep`` are what the last two have in common. ``plan``
says what each takes, and ``check`` asks it before a run starts.
"""

from megatron_tide.hosting.place import host_teacher, hosting_settings
from megatron_tide.hosting.plan.check import check_plan
from megatron_tide.hosting.resident import NoTeacher, ResidentTeacher

__all__ = ["NoTeacher", "ResidentTeacher", "check_plan", "host_teacher", "hosting_settings"]
