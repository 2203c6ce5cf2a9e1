"""A node of an ONNX graph, as torch runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Node:
    """`dead`: values that no later node reads."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    dead: tuple[str, ...] = ()
