"""The regret matrix against its definition, spelled out slowly; and rows of measured and predicted costs."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.objectives.measurement import Measurement
from paretune.search.recommend.regret import INFEASIBLE, regret_matrix
from paretune.search.study.target_records import Target, TargetRow, keep_targets, load_targets
from paretune.search.targets.rows import combined

KEYS, TARGETS = "abcdef", ("x", "y", "z")
cost = st.one_of(st.floats(0.01, 100.0), st.just(INFEASIBLE), st.none())


def slow(costs, losses, limit):
    """(choices, matrix, robust worst) by enumerating everything; None for a cost that is not there."""
    choices = {}
    matrix: dict[tuple[str, str], float | None] = {}
    allowed = [k for k in losses if losses[k] <= limit]
    for target, row in costs.items():
        order = sorted((row[k], losses[k], k) for k in allowed if k in row and row[k] != INFEASIBLE)
        choices[target] = order[0][2] if order else None
    for a, b in itertools.product(costs, costs):
        mine, theirs = choices[a], choices[b]
        if mine is None or theirs is None or mine not in costs[b]:
            matrix[a, b] = None
        else:
            matrix[a, b] = costs[b][mine] / costs[b][theirs] - 1
    worst = {}
    for k in allowed:
        regrets = [costs[t].get(k, None) for t in costs if choices[t] is not None]
        best = [costs[t][choices[t]] for t in costs if choices[t] is not None]
        if regrets and None not in regrets and INFEASIBLE not in regrets:
            worst[k] = max(c / b - 1 for c, b in zip(regrets, best, strict=True))
    return choices, matrix, min(worst.values(), default=None)


@given(
    st.lists(st.lists(cost, min_size=6, max_size=6), min_size=3, max_size=3),
    st.lists(st.floats(-0.1, 0.3), min_size=6, max_size=6),
    st.floats(0, 0.3),
)
def test_the_matrix_is_its_definition(table, loss, limit):
    losses = dict(zip(KEYS, loss, strict=True))
    costs = {
        t: {k: c for k, c in zip(KEYS, row, strict=True) if c is not None}
        for t, row in zip(TARGETS, table, strict=True)
    }
    found = regret_matrix(costs, losses, limit)
    choices, matrix, worst = slow(costs, losses, limit)
    assert found.choices == choices
    assert {(a, b): found.matrix[a][b] for a in TARGETS for b in TARGETS} == matrix
    assert (None if found.robust is None else found.robust.worst) == worst
    for a, b in itertools.product(TARGETS, TARGETS):
        value = found.matrix[a][b]
        assert value is None or (value >= 0 and (a != b or value == 0))
    if found.robust is not None:
        key, where = found.robust.key, found.robust.where
        assert losses[key] <= limit
        assert costs[where][key] / found.best[where] - 1 == found.robust.worst


def test_a_matrix_by_hand():
    costs = {
        "phone": {"small": 1.0, "wide": 1.5, "exact": 4.0},
        "server": {"small": 0.3, "wide": 0.2, "exact": 0.25},
        "fpga": {"small": 2.0, "wide": INFEASIBLE, "exact": 2.2},
    }
    losses = {"small": 0.02, "wide": 0.02, "exact": 0.0}
    found = regret_matrix(costs, losses, 0.03)
    assert found.choices == {"phone": "small", "server": "wide", "fpga": "small"}
    assert found.matrix["phone"] == pytest.approx({"phone": 0, "server": 0.5, "fpga": 0})
    assert found.matrix["server"] == pytest.approx({"phone": 0.5, "server": 0, "fpga": math.inf})
    assert found.robust is not None and (found.robust.key, found.robust.where) == ("small", "server")
    assert found.robust.worst == pytest.approx(0.5)
    tight = regret_matrix(costs, losses, 0.01)
    assert set(tight.choices.values()) == {"exact"} and tight.robust is not None and tight.robust.worst == 0


def test_the_robust_candidate_need_not_be_anybodys_choice():
    costs = {"a": {"p": 1.0, "q": 3.0, "middle": 1.2}, "b": {"p": 3.0, "q": 1.0, "middle": 1.2}}
    found = regret_matrix(costs, {"p": 0.0, "q": 0.0, "middle": 0.0}, 0.01)
    assert found.robust is not None and found.robust.key == "middle" and "middle" not in found.choices.values()
    assert found.robust.worst == pytest.approx(0.2)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_cost_must_be_positive(value):
    with pytest.raises(ValueError, match="must be positive"):
        regret_matrix({"a": {"k": value}}, {"k": 0.0})
    with pytest.raises(ValueError, match="must have a loss"):
        regret_matrix({"a": {"k": 1.0}}, {})


def row(decode, provenance="predicted", **more):
    found = {"decode_ms_per_token": Measurement(decode, "ms/token", 0.5 * decode, 3 * decode, provenance)}
    return TargetRow(found | {n: Measurement(v, "x", v / 2, 2 * v, "predicted") for n, v in more.items()})


def test_three_measured_candidates_correct_the_predictions_of_the_rest():
    source = random.Random(3)
    predicted = {k: row(source.uniform(1, 9), energy_j_per_token=2.0, throughput_tokens_per_s=50.0) for k in KEYS}
    value = {k: r.measurements["decode_ms_per_token"].value for k, r in predicted.items()}
    factors = {"a": 1.5, "b": 2.0, "c": 4.0}
    measured = {k: row(f * value[k], "measured") for k, f in factors.items()}
    rows = combined(predicted, measured)
    for key in KEYS:
        m = rows[key].measurements["decode_ms_per_token"]
        if key in factors:
            assert m == measured[key].measurements["decode_ms_per_token"] and rows[key].is_measured
            energy = rows[key].measurements["energy_j_per_token"]
            assert energy.value == pytest.approx(2.0 * factors[key]) and energy.provenance == "predicted"
            continue
        assert m.provenance == "predicted" and not rows[key].is_measured and "median ratio of 3" in m.note
        assert (m.value, m.low, m.high) == pytest.approx((2 * value[key], 1.5 * value[key], 4 * value[key]))
        assert rows[key].measurements["energy_j_per_token"].value == pytest.approx(4.0)
        tokens = rows[key].measurements["throughput_tokens_per_s"]
        assert tokens.value == pytest.approx(25.0) and tokens.low <= tokens.value <= tokens.high
    del measured["c"]
    assert combined(predicted, measured)["f"] == predicted["f"], "two ratios say too little"


def test_what_cannot_run_stays_so():
    predicted = {"a": row(1.0), "b": TargetRow(infeasible="needs 9 GB, has 8 GB")}
    rows = combined(predicted, {"a": TargetRow(infeasible="the engine refused")})
    assert rows["a"].infeasible == "the engine refused" and rows["b"].infeasible.startswith("needs")
    assert not rows["a"].measurements and not rows["b"].is_measured


class Memory(dict[str, Any]):
    """A store's meta in memory, through JSON as the real one."""

    def meta(self, name, default=None):
        import json

        return json.loads(self[name]) if name in self else default

    def set_meta(self, **values):
        import json

        self.update({name: json.dumps(value) for name, value in values.items()})


def test_targets_come_back_as_they_were_kept_and_in_their_order():
    store = Memory()
    assert load_targets(store) == ()
    one = Target(
        "one", {"name": "one", "threads": 2}, {"a": row(1.0, "measured"), "b": TargetRow(infeasible="no")}, ("n",), 1.5
    )
    two = Target("two", {"name": "two"})
    keep_targets(store, [one, two])
    assert load_targets(store) == (one, two)
    again = Target("one", {"name": "one"}, {"a": row(3.0)}, at=one.at)
    keep_targets(store, [again])
    assert load_targets(store) == (again, two)
    assert one.measured == 1 and one.infeasible == {"b": "no"}
