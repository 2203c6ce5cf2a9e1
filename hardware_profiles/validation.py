"""What pydantic found wrong, in our own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN_RULE = "Value error, "  # pydantic's prefix of a rule that a model has written itself


def said(error: Mapping[str, Any]) -> str:
    """The message of one of `ValidationError.errors()`, ending with the value that came unless the rule has named it already."""
    message = str(error["msg"]).removeprefix(OWN_RULE)
    return message if ", but got " in message else f"{message}, but got {error.get('input')!r}"
