"""Rows of a target from predictions and measurements: what was measured corrects what is predicted beside it. Pure.

A roofline is off by a factor that its candidates largely share (efficiency of the kernels, overhead per op), so on a
target of which some candidates are measured the others' predictions are multiplied by the median ratio of measured to
predicted. Without that a front of measured and predicted members would be decided by who was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from paretune.objectives.measurement import Measurement
from paretune.search.study.target_records import DECODE, TargetRow

LEAST_RATIOS = 3
# Quantities that no visit takes, but that follow from decode: multiplied by the power of its ratio.
FOLLOWING = {"energy_j_per_token": 1, "usd_per_million_tokens": 1, "throughput_tokens_per_s": -1}
Rows = Mapping[str, TargetRow]


def combined(predicted: Rows, measured: Rows) -> dict[str, TargetRow]:
    """A row per candidate: measured where it is, else predicted, by a factor once three candidates have both."""
    factors = ratios(predicted, measured)
    rows = {key: row if row.infeasible else _corrected(row, factors) for key, row in predicted.items()}
    for key, row in measured.items():
        beside = predicted[key].measurements if key in predicted else {}
        rows[key] = row if row.infeasible else TargetRow({**_following(beside, row), **row.measurements})
    return rows


def _following(beside: Mapping[str, Measurement], row: TargetRow) -> dict[str, Measurement]:
    """The predictions beside a measured row; what follows from decode is as much more as its decode is."""
    found = dict(beside)
    if DECODE not in beside or DECODE not in row.measurements:
        return found
    ratio = row.measurements[DECODE].value / beside[DECODE].value
    for name, power in FOLLOWING.items():
        if name in found:
            m, by = found[name], ratio**power
            found[name] = replace(m, value=m.value * by, low=m.low * by, high=m.high * by)
    return found


def ratios(predicted: Rows, measured: Rows) -> dict[str, list[float]]:
    """Measured over predicted value by measurement name, of all candidates that have both."""
    found: dict[str, list[float]] = {}
    for key, row in measured.items():
        beside = predicted[key].measurements if key in predicted else {}
        for name, m in row.measurements.items():
            if m.provenance == "measured" and name in beside and beside[name].value > 0:
                found.setdefault(name, []).append(m.value / beside[name].value)
    return found


def _corrected(row: TargetRow, factors: Mapping[str, list[float]]) -> TargetRow:
    found = {}
    for name, m in row.measurements.items():
        own, decode = factors.get(name, []), factors.get(DECODE, [])
        if len(own) >= LEAST_RATIOS:
            found[name] = _scaled(m, own)
        elif name in FOLLOWING and len(decode) >= LEAST_RATIOS:
            found[name] = _scaled(m, [f ** FOLLOWING[name] for f in decode])
        else:
            found[name] = m
    return TargetRow(found)


def _scaled(m: Measurement, factors: list[float]) -> Measurement:
    """By the median; the interval runs over all ratios that were seen."""
    middle = median(factors)
    note = f"times {middle:.2f}, the median ratio of {len(factors)} measured here ({min(factors):.2f} … {max(factors):.2f})"
    return replace(
        m,
        value=m.value * middle,
        low=m.value * min(factors),
        high=m.value * max(factors),
        samples=len(factors),
        note=f"{m.note}; {note}" if m.note else note,
    )
