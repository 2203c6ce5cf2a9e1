"""Dominance, ranks and hypervolume against brute force, with ties and duplicates."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.search.front import Vector, dominates, hypervolume, non_dominated, ranks

COARSE = st.integers(0, 4).map(float)  # few values: many ties and duplicates


def fronts(most: int = 9) -> st.SearchStrategy[list[Vector]]:
    return st.integers(1, 4).flatmap(lambda m: st.lists(st.tuples(*[COARSE] * m), min_size=0, max_size=most))


def slow_dominates(a: Vector, b: Vector) -> bool:
    return not any(x > y for x, y in zip(a, b, strict=True)) and a != b


@given(st.integers(1, 4).flatmap(lambda m: st.tuples(st.tuples(*[COARSE] * m), st.tuples(*[COARSE] * m))))
def test_dominance(pair: tuple[Vector, Vector]) -> None:
    a, b = pair
    assert dominates(a, b) == slow_dominates(a, b)
    assert not (dominates(a, b) and dominates(b, a))
    assert not dominates(a, a)


@given(fronts())
def test_the_front_is_what_nothing_dominates_and_keeps_duplicates(points: list[Vector]) -> None:
    found = non_dominated(points)
    assert found == sorted(found)
    for i, p in enumerate(points):
        assert (i in found) == (not any(slow_dominates(q, p) for q in points))
    assert bool(found) == bool(points)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, float("inf"), float("nan")])] * 3), max_size=20))
def test_the_front_is_by_definition_with_infinities_and_nan_too(points: list[Vector]) -> None:
    assert non_dominated(points) == [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]


@given(fronts())
def test_ranks_are_the_longest_chains_of_domination(points: list[Vector]) -> None:
    """Oracle: a point's rank is the length of the longest chain of points that dominate one another and it."""

    def chain(p: Vector) -> int:
        return max((1 + chain(q) for q in set(points) if slow_dominates(q, p)), default=0)

    assert ranks(points) == [chain(p) for p in points]


@given(fronts())
def test_the_order_of_the_points_does_not_matter(points: list[Vector]) -> None:
    turned = points[::-1]
    assert ranks(turned) == ranks(points)[::-1]
    assert {points[i] for i in non_dominated(points)} == {turned[i] for i in non_dominated(turned)}


def slow_hypervolume(points: list[Vector], reference: Vector) -> float:
    """Inclusion and exclusion over all sets of dominated boxes."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            corner = [max(p[m] for p in chosen) for m in range(len(reference))]
            total += (-1) ** (size + 1) * math.prod(max(0.0, r - c) for r, c in zip(reference, corner, strict=True))
    return total


@given(fronts(6), st.integers(1, 5).map(float))
def test_hypervolume_is_inclusion_and_exclusion(points: list[Vector], r: float) -> None:
    m = len(points[0]) if points else 2
    reference = (r, r + 1, r, r + 2)[:m]
    assert hypervolume(points, reference) == pytest.approx(slow_hypervolume(points, reference))


@given(fronts(7), st.integers(0, 6))
def test_hypervolume_counts_only_the_front_and_grows_with_it(points: list[Vector], dropped: int) -> None:
    if not points:
        return
    reference = (5.0,) * len(points[0])
    whole = hypervolume(points, reference)
    assert hypervolume([points[i] for i in non_dominated(points)], reference) == pytest.approx(whole)
    assert hypervolume(points + points, reference) == pytest.approx(whole)
    assert hypervolume([p for i, p in enumerate(points) if i != dropped], reference) <= whole + 1e-9


def test_points_at_or_beyond_the_reference_have_no_volume() -> None:
    assert hypervolume([], (1.0, 1.0)) == 0
    assert hypervolume([(1.0, 0.0), (0.0, 1.0), (2.0, -5.0)], (1.0, 1.0)) == 0
    assert hypervolume([(0.0, 0.0)], (1.0, 1.0)) == 1
    assert hypervolume([(0.0, 0.5), (0.5, 0.0)], (1.0, 1.0)) == pytest.approx(0.75)
