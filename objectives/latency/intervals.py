"""Spread between processes, which of them are odd, and the interval that follows from few visits."""

from __future__ import annotations

import math
from statistics import mean, median

PRIOR_DF = 4  # degrees of freedom of the reference's own spread: it is learnt from one visit more
ODD = 6.0  # spreads away from the median
MOST_ODD = 1 / 3  # of all visits


def robust_spread(values: list[float]) -> float:
    """Standard deviation by the median absolute deviation: one odd process in five must not widen every interval for ever."""
    center = median(values)
    return 1.4826 * median(abs(v - center) for v in values)


def moderated_interval(values: list[float], spread: float, prior_df: int = PRIOR_DF) -> tuple[float, float, float]:
    """Mean of the visits and its 95 % interval; their variance is pooled with (spread × mean)² seen on `prior_df` degrees of freedom."""
    from scipy.stats import t

    center, n = mean(values), len(values)
    squares = prior_df * (spread * center) ** 2 + sum((v - center) ** 2 for v in values)
    df = prior_df + n - 1
    half = float(t.ppf(0.975, df)) * math.sqrt(squares / df / n)
    return center, center - half, center + half


def odd_ones(values: list[float], spread: float) -> set[int]:
    """Positions of values further than ODD × `spread` (a fraction) from their median; none if they are more than MOST_ODD of all.

    About one process in forty lies badly in memory and decodes up to a sixth slower for its whole life (docs/log.md): in a mean
    of three it would move the value beyond its own interval. Where such processes are frequent, they are what a user gets.
    """
    center = median(values)
    found = {i for i, v in enumerate(values) if abs(v / center - 1) > ODD * spread}
    return found if len(found) <= MOST_ODD * len(values) else set()


def half_width(low: float, value: float, high: float) -> float:
    """The wider half of an interval as a fraction of the value."""
    half = max(high - value, value - low)
    return half / abs(value) if value else math.inf if half else 0.0
