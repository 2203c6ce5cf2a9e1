"""The search that goes axis by axis: what it proposes in which order, against slow oracles; and the volume fronts are compared by."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from paretune.search.evaluators.simulated import SHAPE, compressed_size, decode_ms, loss
from paretune.search.hypervolume import corner, in_teacher_units, volume
from paretune.search.samplers.sequential import MASK, ROUNDS, SIZE, SequentialPlan, choices
from paretune.search.spec import Reference, Spec
from paretune.spaces import Candidate, Space

OBJECTIVES = ("nll", "decode_ms_per_token", "compressed_bytes")
KERNELS = ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32")
TEACHER = 1.8


class Told:
    """What the search knows and estimates, without a store; `explore` answers what a plan asks for."""

    def __init__(self, space: Space, **options: Any) -> None:
        self.space, self.spec, self.ledger = space, Spec(**options), self
        self.meta: dict[str, Any] = {}
        self.store = SimpleNamespace(meta=lambda n, d=None: self.meta.get(n, d), set_meta=self.set_meta)
        self.rows = {c.key: c for c in space.baselines()}
        self.baselines = set(self.rows)
        self.latest = {(key, "confirmed"): SimpleNamespace(key=key, status="complete") for key in self.rows}
        self.order: list[dict[str, Any]] = []
        self.unanswered: set[str] = set()

    def set_meta(self, **values: Any) -> None:
        self.meta |= copy.deepcopy(values)

    def values(self, candidate: Candidate) -> tuple[float, ...]:
        return (TEACHER + loss(candidate), decode_ms(candidate), compressed_size(candidate))

    def vector(self, key: str) -> tuple[float, ...] | None:
        usable = key in self.rows and key not in self.baselines | self.unanswered
        return self.values(self.rows[key]) if usable else None

    def confirmed_vector(self, e: Any) -> tuple[float, ...]:
        return self.values(self.rows[e.key])

    def constraints(self, key: str) -> dict[str, float]:
        return {"loss": (self.values(self.rows[key])[0] / TEACHER - 1) / self.spec.loss_of_interest - 1}

    def predictions(self, candidate: Candidate) -> dict[str, Any]:
        return {"decode_ms_per_token": SimpleNamespace(value=decode_ms(candidate))}

    def explore(self, count: int) -> list[dict[str, Any]]:
        """What `count` asks of one plan give, or fewer at its end."""
        plan = SequentialPlan(self)  # type: ignore[arg-type]
        for params in itertools.islice(iter(plan.ask, None), count):
            candidate = self.space.decode(params)
            assert candidate.key not in self.rows, "proposed twice"
            self.rows[candidate.key] = candidate
            self.order.append(params)
        return self.order


@pytest.fixture
def told() -> Told:
    return Told(Space.of(SHAPE, KERNELS, second_order=False), sampler="sequential", loss_of_interest=0.3)


def part(params: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(params[name] for name in names if name in params)


def precision(params: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((n, v) for n, v in params.items() if n not in (*SIZE, *MASK)))


def test_a_size_is_done_before_the_next_and_its_mask_before_its_precisions(told: Told) -> None:
    order = told.explore(60)
    sizes = [size for size, _ in itertools.groupby(order, lambda p: part(p, SIZE))]
    assert len(sizes) == len(set(sizes)) >= 4
    for size in sizes[:-1]:
        mine = [p for p in order if part(p, SIZE) == size]
        fixed = {precision(p) for p in mine if part(p, MASK) != part(mine[-1], MASK)}
        assert len(fixed) <= 1, "masks must be compared at one precision"
        first = next((i for i, p in enumerate(mine) if precision(p) not in fixed), len(mine))
        assert len({part(p, MASK) for p in mine[first:]}) <= 1, "every precision must be under one mask"


def test_the_best_mask_is_that_of_the_greatest_volume(told: Told) -> None:
    """The oracle is the product of the three distances to the corner."""
    order = told.explore(80)
    base = told.values(told.space.baselines()[0])
    checked = 0
    for size in dict.fromkeys(part(p, SIZE) for p in order):
        mine = [p for p in order if part(p, SIZE) == size]
        if len(mine) < 15 or part(mine[0], MASK)[0] != "none":
            continue
        masks = [p for p in mine if precision(p) == precision(mine[0])]
        products = []
        for p in masks:
            x = told.values(told.space.decode(p))
            products.append(
                max(0.0, 0.25 - (x[0] / base[0] - 1)) * (1.1 - x[1] / base[1]) * max(0.0, 1.1 - x[2] / base[2])
            )
        best = masks[max(range(len(masks)), key=products.__getitem__)]
        assert part(mine[-1], MASK) == part(best, MASK)
        checked += 1
    assert checked >= 2


def test_sizes_are_spread_over_the_latency_and_are_the_heaviest_of_their_speed(told: Told) -> None:
    told.explore(1)
    sizes = told.meta["sequential"]["sizes"]["list"]
    fixed = {n: v for n, v in told.order[0].items() if n not in SIZE}
    latency = [decode_ms(told.space.decode(size | fixed)) for size in sizes]
    variables = told.space.distributions()
    names = [n for n in SIZE if n in variables]
    every = [dict(zip(names, c, strict=True)) for c in itertools.product(*(choices(variables[n]) for n in names))]
    times = [decode_ms(told.space.decode(s | fixed)) for s in every]
    assert latency[0] == max(times)
    for level, found in zip((0.5, 0.25, 0.75), latency[1:4], strict=True):
        wanted = min(times) + level * (max(times) - min(times))
        assert abs(found - wanted) <= 0.05 * wanted
    assert len({tuple(s.values()) for s in sizes}) == len(sizes) <= max(step.sizes for step in ROUNDS)
    chosen = {tuple(s.values()) for s in sizes[:4]}

    def weights(size: dict[str, Any]) -> float:
        x = told.space.decode(size | fixed)
        return sum(3 * y.ffn + 2 * 32 * 3 * y.kv_groups for y in x.layers)

    for size, own in zip(sizes[:4], latency, strict=False):
        rivals = [
            s for s, t in zip(every, times, strict=True) if abs(t - own) < 0.005 and tuple(s.values()) not in chosen
        ]
        assert all(weights(r) <= 1.1 * weights(size) for r in rivals)


def test_a_size_that_loses_too_much_while_dense_is_left_at_that(told: Told) -> None:
    order = told.explore(120)
    lost = {p["depth"] for p in order if told.constraints(told.space.decode(p).key)["loss"] > 0}
    assert lost, "the space has no such size"
    alone = [
        size
        for size in dict.fromkeys(part(p, SIZE) for p in order[:-20])
        if len([p for p in order if part(p, SIZE) == size]) == 1
    ]
    assert alone
    for size in alone:
        (only,) = [p for p in order if part(p, SIZE) == size]
        assert only["pattern"] == "none"
        assert told.constraints(told.space.decode(only).key)["loss"] > 0


def test_another_plan_over_the_same_store_goes_on_where_the_first_stopped(told: Told) -> None:
    whole = told.explore(70)
    again = Told(told.space, sampler="sequential", loss_of_interest=0.3)
    for count in (1, 7, 12, 50):
        again.explore(count)
    assert again.order == whole


def test_decisions_stand_when_the_estimates_move(told: Told) -> None:
    """Calibration shifts every estimate later; a size must not change its mask half-way through its precisions."""
    told.explore(9)
    masks = dict(told.meta["sequential"]["masks"])
    assert masks
    told.values = lambda candidate: (TEACHER, decode_ms(candidate), 1.0)  # type: ignore[method-assign]
    told.explore(3)
    assert masks.items() <= told.meta["sequential"]["masks"].items()
    assert {part(p, MASK) for p in told.order[9:]} == {part(next(iter(masks.values())), MASK)}


def test_candidates_that_failed_are_passed_over(told: Told) -> None:
    told.explore(2)
    told.unanswered = set(told.rows) - told.baselines
    order = told.explore(60)
    assert len(order) == 62
    told.unanswered = set()


def test_a_small_space_comes_to_its_end_with_all_of_it_proposed() -> None:
    """Without sparse masks to choose from there is nothing that the plan leaves out."""
    small = Told(Space(SHAPE, ("fp32/fp32", "int8/int8"), 6, 768, 4, second_order=False), loss_of_interest=9.0)
    small.explore(10_000)
    bits = {tuple(p[n] for n in p if n.endswith("_bits")) for p in small.order}
    assert len(bits) >= 14  # sixteen combinations, two of which are baselines
    patterns = {(p["pattern"], p["score"], p["ratio"]) for p in small.order if p["pattern"] != "none"}
    assert {p for p, _, _ in patterns} == {"2:4", "unstructured", "threshold", "block"}
    assert len({r for p, _, r in patterns if p == "block"}) == 5


def test_volume_in_teacher_units() -> None:
    assert in_teacher_units((2.2, 3.0, 10.0), (2.0, 6.0, 40.0), OBJECTIVES) == pytest.approx((0.1, 0.5, 0.25))
    assert corner(Reference(loss=0.2, times=1.5), OBJECTIVES) == (0.2, 1.5, 1.5)
    whole = volume([(0.0, 0.0, 0.0)], Reference(), OBJECTIVES)
    assert whole == pytest.approx(1.0)
    assert volume([(0.125, 0.55, 0.55)], Reference(), OBJECTIVES) == pytest.approx(1 / 8)
    assert volume([(0.3, 0.1, 0.1), (0.0, 1.2, 0.1)], Reference(), OBJECTIVES) == 0.0
    assert volume([], Reference(), OBJECTIVES) == 0.0
    assert math.isclose(volume([(0.125, 0.55)], Reference(), OBJECTIVES[:2]), 1 / 4)
