"""Text that is no valid Unicode, as of file names in Latin-1: Python keeps such bytes as lone surrogates, which no answer can carry."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse

from paretune.common.text import clean

printable = clean


def is_printable(text: str) -> bool:
    """Whether it can be sent as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sendable(data: Any) -> Any:
    """JSON-able data with its texts `printable` and null for numbers that JSON does not have."""
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {sendable(key): sendable(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [sendable(value) for value in data]
    return data


class Json(JSONResponse):
    """An answer that can always be sent: a study may hold an infinite perplexity, or the name of a file that is no Unicode."""

    def render(self, content: Any) -> bytes:
        """Return `content` as JSON in UTF-8; what neither can hold is replaced as `sendable` does."""
        try:
            return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except ValueError:  # UnicodeEncodeError is one
            return json.dumps(sendable(content), ensure_ascii=False, separators=(",", ":")).encode()
