"""Plans and prepared searches that were not really planned."""

from __future__ import annotations

from paretune.search.prepare.plan import Plan
from paretune.search.spec import Spec
from paretune.spaces.kinds import AnySpace


def empty_plan(space: AnySpace, spec: Spec) -> Plan:
    """A plan over `space` that says nothing of text, disk and memory."""
    return Plan("x", 1, "local-cpu", space.size(), {}, spec.budget_s, {}, 0, 0, 0, 0, 0, 0, ())
