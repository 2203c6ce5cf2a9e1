"""What pydantic found wrong, in our own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretune.common.text import clean

MOST_SHOWN = 200
OWN_RULE = "Value error, "  # pydantic's prefix of a rule that a model has written itself


def said(error: Mapping[str, Any]) -> str:
    """The message of one of `ValidationError.errors()`, ending with the value that came unless the rule has named it already."""
    message = str(error["msg"]).removeprefix(OWN_RULE)
    if ", but " in message:
        return clean(message)
    try:
        got = repr(error.get("input"))
    except RecursionError:
        got = "something nested too deeply"
    return clean(f"{message}, but got {got if len(got) < MOST_SHOWN else got[:MOST_SHOWN] + '…'}")
