"""Which quantities are better when larger, and their one normalisation: inside, the search minimizes everything.

A maximized quantity enters as its reciprocal, not with its sign turned: ratios to a teacher, sums of ratios and limits keep
their meaning (twice the tokens per second is half the cost), and dominance is the same.
"""

from __future__ import annotations

MAXIMIZED = frozenset({"throughput_tokens_per_s"})


def minimized(name: str, value: float) -> float:
    """What the search minimizes for `value` of the measurement `name`; its own inverse. A throughput of 0 is infinitely bad."""
    if name not in MAXIMIZED:
        return value
    return 1 / value if value else float("inf")


def excess(name: str, value: float, limit: float) -> float:
    """By which fraction a limit is missed, at or below 0 where it is kept; of a maximized quantity the limit is the least value."""
    return minimized(name, value) / minimized(name, limit) - 1
