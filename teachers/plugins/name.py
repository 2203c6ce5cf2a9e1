"""How a search names a plug-in, without loading anything."""

from __future__ import annotations

PREFIX, ENTRY_POINTS = "plugin:", "paretune.teachers"


def is_plugin(teacher: str) -> bool:
    """Whether a search's teacher names a plug-in."""
    return teacher.startswith(PREFIX)
