"""The multiple-choice knapsack against every selection there is, and against a table over all capacities."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.spaces.knapsack import Choices, knapsack

# Losses are small integers, so that sums are exact and equal ones are frequent.
choices = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6).map(float)), min_size=1, max_size=4)
problems = st.tuples(st.lists(choices, max_size=5), st.integers(-3, 50))


def total(items: list[Choices], taken: tuple[int, ...]) -> tuple[int, float]:
    return sum(c[j][0] for c, j in zip(items, taken, strict=True)), sum(
        c[j][1] for c, j in zip(items, taken, strict=True)
    )


def brute_force(items: list[Choices], capacity: int) -> tuple[int, ...]:
    """Every selection: the least loss that fits, then the least cost, then the first; the cheapest where none fits."""
    selections = list(itertools.product(*(range(len(c)) for c in items)))
    fitting = [s for s in selections if total(items, s)[0] <= capacity]
    if fitting:
        return min(fitting, key=lambda s: (*total(items, s)[::-1], s))
    return min(selections, key=lambda s: (*total(items, s), s))


@given(problems)
def test_it_is_what_brute_force_finds_ties_included(problem: tuple[list[Choices], int]) -> None:
    items, capacity = problem
    assert knapsack(items, capacity) == brute_force(items, capacity)


@given(problems, st.integers(0, 20))
def test_more_capacity_never_loses_more(problem: tuple[list[Choices], int], more: int) -> None:
    items, capacity = problem
    least = sum(min(c for c, _ in choices) for choices in items)
    small, large = (total(items, knapsack(items, max(capacity, least) + extra)) for extra in (0, more))
    assert large[1] <= small[1]
    assert small[0] <= max(capacity, least)


@given(problems)
def test_a_choice_that_nobody_would_take_changes_nothing(problem: tuple[list[Choices], int]) -> None:
    items, capacity = problem
    worse = [[*choices, (max(c for c, _ in choices) + 1, max(v for _, v in choices) + 1.0)] for choices in items]
    assert knapsack(worse, capacity) == knapsack(items, capacity)


def by_capacity(items: list[Choices], capacity: int) -> float:
    """The textbook table: least loss for every capacity, item by item."""
    best = [0.0] * (capacity + 1)
    for choices in items:
        best = [
            min((best[room - c] + v for c, v in choices if c <= room), default=float("inf"))
            for room in range(capacity + 1)
        ]
    return best[capacity]


@pytest.mark.parametrize("seed", range(4))
def test_many_items_with_real_losses_match_the_table_over_capacities(seed: int) -> None:
    source = random.Random(seed)
    items: list[Choices] = []
    for _ in range(25):
        size, worth = source.randint(1, 9), source.lognormvariate(0, 1.5)
        items.append([(size * bits, worth * size * 4.0**-bits * source.uniform(0.8, 1.2)) for bits in (2, 3, 4, 6, 8)])
    floor, top = (sum(pick(c for c, _ in item) for item in items) for pick in (min, max))
    for capacity in (floor, (3 * floor + top) // 4, (floor + top) // 2, top):
        cost, loss = total(items, knapsack(items, capacity))
        assert cost <= capacity
        assert loss == pytest.approx(by_capacity(items, capacity), rel=1e-12)


def test_sixty_layers_of_different_widths_are_solved() -> None:
    """All costs differ, so that no two selections cost the same and only the bound keeps the states few."""
    source = random.Random(1)
    items: list[Choices] = []
    for _ in range(120):
        size, worth = source.randint(10**6, 10**7), source.lognormvariate(0, 1.5)
        items.append([(size * bits, worth * 4.0**-bits * source.uniform(0.8, 1.2)) for bits in (4, 5, 8, 9)])
    capacity = sum(item[0][0] for item in items) * 5 // 4
    taken = knapsack(items, capacity)
    cost, loss = total(items, taken)
    assert cost <= capacity
    # No exchange of two choices may be better: a necessary condition that a greedy answer breaks.
    for (i, a), (j, b) in itertools.combinations(enumerate(items), 2):
        room, both = capacity - cost + a[taken[i]][0] + b[taken[j]][0], a[taken[i]][1] + b[taken[j]][1]
        assert all(x[0] + y[0] > room or x[1] + y[1] >= both - 1e-12 * loss for x in a for y in b)


def test_an_item_without_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one choice"):
        knapsack([[(1, 1.0)], []], 3)
