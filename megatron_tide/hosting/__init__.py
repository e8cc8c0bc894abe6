"""Where the teacher lives. Every host has one method, ``score(window) -> answers``, and gives the same numbers."""

from megatron_tide.hosting.resident import NoTeacher, ResidentTeacher

__all__ = ["NoTeacher", "ResidentTeacher"]
