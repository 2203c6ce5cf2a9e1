"""Errors of the command line, said to those who send settings by HTTP or in a form: they have no options."""

from __future__ import annotations

import re

from paretune.search.spec import Spec

OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
QUOTED = re.compile(r"(`[^`]*`)")  # a command to be run stays one
OTHERS = {"study": "name", "home": "home of the service"}
HOMES = (
    ("another --home", "another home of the service"),
    ("with --home", "as the service's home"),
    ("another --study name", "another `name`"),
)


def without_options(text: str) -> str:
    """`--qat-threshold` becomes `qat_threshold`, as it is called in `spec`."""
    parts = QUOTED.split(text)
    return "".join(part if i % 2 else _said(part) for i, part in enumerate(parts))


def _said(text: str) -> str:
    for option, words in HOMES:
        text = text.replace(option, words)
    return OPTION.sub(_name, text)


def _name(found: re.Match[str]) -> str:
    name = found[1].replace("-", "_")
    if name in Spec.model_fields:
        return f"`{name}`"
    return OTHERS.get(found[1], found[0])
