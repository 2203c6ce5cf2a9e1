"""Which op of which layer an engine's error is about.

ONNX Runtime names the node in most of its messages, each time in another way; where it names only the op, the graph is
searched for it. Nodes carry their layer in their name: `/model/layers.3/mlp/up_proj`.
"""

from __future__ import annotations

import re
from pathlib import Path

NODE = re.compile(r"(?:[Nn]ode with name|Name:|Node ?\(|node ?\(|[Nn]ode:|at node)\s*'?\"?(/[\w./-]+)")
OP = (
    re.compile(r"implementation for (?:[\w.]+[.:])?(\w+)\(\d+\)"),
    re.compile(r"running (\w+) node"),
    re.compile(r"Op \((\w+)\)"),
    re.compile(r"No Op registered for (\w+)"),
    re.compile(r"supported for (\w+) op\b"),
    re.compile(r"[\w.]*[.:](\w+)\(-?\d+\) is not a registered function/op"),
)
LAYER = re.compile(r"/layers\.(\d+)/")


def place_of(error: str, model: Path | None) -> str:
    """`MatMul of layer 3 (/model/layers.3/mlp/up_proj)`, as far as an engine's message and the graph in `model` tell.

    An error in the making of a kernel names no node; then it is the op alone, or nothing, unless the graph has only one such op.
    """
    node = next(iter(NODE.findall(error)), "")
    op = next((match[1] for pattern in OP if (match := pattern.search(error))), "")
    if model is not None and bool(node) != bool(op):
        node, op = _look_up(model, node, op)
    if not node:
        return op
    layer = LAYER.search(node)
    return f"{op or 'an op'} {'of layer ' + layer[1] if layer else 'outside the layers'} ({node})"


def _look_up(model: Path, node: str, op: str) -> tuple[str, str]:
    """Name and op of the node of this name, or of the only one of this op; what is known already where there is none."""
    try:
        import onnx

        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception:  # the engine has refused it, so it may be anything
        return node, op
    found = [n for n in graph.node if (node == n.name if node else op == n.op_type)]
    return (found[0].name, found[0].op_type) if len(found) == 1 else (node, op)
