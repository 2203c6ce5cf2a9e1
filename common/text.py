"""Text from outside: what is no Unicode, or cannot be part of a name, is refused before it is kept.

JSON and YAML can spell half of a surrogate pair (`"\\ud800"`), and Python turns bytes of a command line that are no UTF-8 into
one. No UTF-8 file, database or answer can hold it: kept once, it breaks every list that shows it.
"""

from __future__ import annotations

import json
import re
from typing import Any

MOST_LEVELS = 50
SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters except tab and line ends; none of them can be part of a name or a path that people write.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def problem_of(text: str) -> str | None:
    """What is wrong with a text, None if nothing is."""
    if found := SURROGATE.search(text):
        return (
            f"text must be valid Unicode, but character {found.start() + 1} is half of a pair (U+{ord(found[0]):04X})"
        )
    if found := CONTROL.search(text):
        return f"text must have no control characters, but character {found.start() + 1} is U+{ord(found[0]):04X}"
    return None


def require_text(value: Any, where: str = "", levels: int = MOST_LEVELS) -> None:
    """Raises ValueError naming the first text inside plain data (keys, too) that is not fit to be kept."""
    if levels == 0:
        raise ValueError(f"{where or 'settings'}: at most {MOST_LEVELS} levels may be nested, but there are more")
    if isinstance(value, str):
        if problem := problem_of(value):
            raise ValueError(f"{where}: {problem}" if where else problem)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str) and (problem := problem_of(key)):
                raise ValueError(f"the key {clean(key)!r}: {problem}")
            require_text(inner, f"{where}.{key}" if where else str(key), levels - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            require_text(inner, where, levels - 1)


def clean(text: str) -> str:
    """The text with what is no Unicode escaped: the byte E9 becomes `\\xe9`. Valid text is unchanged."""
    if not SURROGATE.search(text):
        return text
    try:
        return text.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")
    except UnicodeEncodeError:  # a half that stands for no byte
        return text.encode("utf8", "backslashreplace").decode()


def cleaned(value: Any) -> Any:
    """Plain data with `clean` texts and keys."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key) if isinstance(key, str) else key: cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [cleaned(inner) for inner in value]
    return value


def loads(text: str) -> Any:
    """JSON that was kept. Halves of pairs, which an older version may have kept, are escaped: no answer could hold them."""
    found = json.loads(text)
    return cleaned(found) if "\\ud" in text.lower() else found
