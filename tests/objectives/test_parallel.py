"""The cost of dividing a model among devices, against sums done by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from paretune.common.errors import Infeasible, UsageError
from paretune.objectives.prediction.parallel import (
    all_reduce_ms,
    degree_fact,
    layers_reduce_ms,
    pipeline_ms,
    pipeline_stages,
    send_ms,
    split_candidate,
    split_problem,
    split_shape,
    tensor_parallel_degree,
)
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape
from paretune.spaces.candidate import DENSE, FP32

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(4, 512, 1536, 16, 8, 64, 32000, tied=False)
LINKED = SimpleNamespace(name="linked", memory_bytes=10**9, devices=8, link_alpha_us=6.0, link_gb_per_s=450.0)
ALONE = SimpleNamespace(name="alone", memory_bytes=10**9, devices=1, link_alpha_us=None, link_gb_per_s=None)
INT4 = Format(4, 128, "int8")


def whole(form: Format = FP32, pattern: Pattern = DENSE) -> Candidate:
    return Candidate((Layer(SHAPE.ffn, SHAPE.kv_heads, form, form, pattern),) * SHAPE.layers, form, form)


def ring(p: int, message: float, alpha_us: float, gb_per_s: float) -> float:
    """A ring step by step: p - 1 steps that reduce, p - 1 that gather, each sends one p-th of the message. Microseconds."""
    clock = 0.0
    for _phase in ("reduce-scatter", "all-gather"):
        for _step in range(p - 1):
            clock += alpha_us + message / p / (gb_per_s * 1e3)
    return clock


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
@pytest.mark.parametrize("message", [0, 8192, 5e8])
def test_an_all_reduce_costs_the_steps_of_a_ring(degree: int, message: float) -> None:
    assert all_reduce_ms(message, degree, LINKED) == pytest.approx(ring(degree, message, 6.0, 450.0) / 1e3)


def test_a_layer_has_two_all_reduces_and_a_boundary_one_message() -> None:
    once = all_reduce_ms(512 * 3 * 7 * 2, 4, LINKED)
    assert layers_reduce_ms(4, 512, 7, 4, LINKED, batch=3) == pytest.approx(8 * once)
    assert layers_reduce_ms(4, 512, 7, 1, ALONE) == 0
    assert send_ms(450e3, LINKED) == pytest.approx(0.006 + 0.001)
    assert pipeline_ms(10.0, 3, 450e3, LINKED) == pytest.approx(10 + 2 * 0.007), "no faster than one device"
    assert pipeline_ms(10.0, 1, 450e3, ALONE) == 10


def test_impossible_messages_and_unknown_links_are_refused() -> None:
    for message, degree in ((-1.0, 2), (float("inf"), 2), (float("nan"), 2), (1.0, 0)):
        with pytest.raises(ValueError):
            all_reduce_ms(message, degree, LINKED)
    with pytest.raises(UsageError, match="alone must say link_alpha_us"):
        all_reduce_ms(1.0, 2, ALONE)
    for stages, blocks in ((0, [1.0]), (1, [])):
        with pytest.raises(ValueError):
            pipeline_stages(blocks, stages)


def test_the_degree_is_the_least_that_divides_the_heads_and_fits() -> None:
    def needed(total: float) -> Callable[[int], float]:
        return lambda n: total / n

    assert tensor_parallel_degree(needed(1e9), LINKED, SHAPE) == 1
    assert tensor_parallel_degree(needed(1.01e9), LINKED, SHAPE) == 2
    assert tensor_parallel_degree(needed(2.5e9), LINKED, SHAPE) == 4, "3 does not divide 8 KV heads"
    six = replace(SHAPE, heads=12, kv_heads=6)
    assert tensor_parallel_degree(needed(2.5e9), LINKED, six) == 3
    assert tensor_parallel_degree(lambda n: 0.0 if n == 8 else float("inf"), LINKED, SHAPE) == 8
    with pytest.raises(Infeasible, match=r"1\.00 GB, but the candidate needs 9\.00 GB on one, 4\.50 GB on each of 2"):
        tensor_parallel_degree(needed(9e9), LINKED, SHAPE)
    with pytest.raises(Infeasible, match=r"needs 1\.01 GB on one \(1 devices, 8 KV heads"):
        tensor_parallel_degree(needed(1.01e9), ALONE, SHAPE)
    with pytest.raises(Infeasible, match="cannot be divided among 2"):
        tensor_parallel_degree(lambda n: 9e9 if n == 1 else float("inf"), LINKED, SHAPE)
    fact = degree_fact(4, LINKED)
    assert (fact.value, fact.unit, fact.provenance) == (4, "devices", "predicted")


def test_what_k_is_divided_into_is_whole_groups_and_blocks() -> None:
    assert split_problem(whole(), SHAPE, 8) is None
    assert split_problem(whole(INT4), SHAPE, 4) is None  # 1024 / 4 and 1536 / 4 are multiples of 128
    problem = split_problem(whole(INT4), SHAPE, 8)  # 1536 / 8 = 192
    assert problem is not None and "inner width 1536 of the FFN must be whole groups of 128 on each of 8" in problem
    assert split_problem(whole(replace(INT4, group_size=64)), SHAPE, 8) is None
    assert split_problem(whole(replace(INT4, group_size=0)), SHAPE, 8) is None, "one scale per channel"
    thin = replace(SHAPE, head_dim=16, heads=8)
    assert split_problem(whole(pattern=Pattern("2:4", 0.5)), thin, 8) is None
    problem = split_problem(whole(pattern=Pattern("block", 0.5)), thin, 8)  # one head of 16, blocks are 32 wide
    assert problem is not None and "inner width 128 of the attention must be whole groups of 32" in problem
    cut = Candidate((Layer(1536, 8), Layer(1536, 6)))
    problem = split_problem(cut, SHAPE, 4)
    assert problem is not None and "layer 1 has 6 KV heads" in problem
    with pytest.raises(Infeasible, match="layer 1 has 6"):
        split_candidate(cut, SHAPE, 4)
    assert split_candidate(cut, SHAPE, 2) == Candidate((Layer(768, 4), Layer(768, 3)))
    with pytest.raises(Infeasible, match="8 KV heads must be a multiple of the number of devices, but got 3"):
        split_shape(SHAPE, 3)
    assert split_shape(replace(SHAPE, vocab=32001), 2) == replace(SHAPE, heads=8, kv_heads=4, ffn=768, vocab=16001), (
        "the width of the residual stream stays"
    )


def test_pipeline_stages_have_the_smallest_possible_largest_stage() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        blocks = [float(b) for b in generator.integers(1, 30, generator.integers(1, 9))]
        for stages in range(1, 6):
            found = pipeline_stages(blocks, stages)
            assert [i for stage in found for i in stage] == list(range(len(blocks))) and len(found) <= stages
            best = min(  # every way to cut, by trying them all
                max(sum(blocks[a:b]) for a, b in zip((0, *cuts), (*cuts, len(blocks)), strict=True))
                for count in range(min(stages, len(blocks)))
                for cuts in combinations(range(1, len(blocks)), count)
            )
            assert max(sum(blocks[i] for i in stage) for stage in found) == best


def test_the_worked_example_of_the_page_is_what_the_functions_say() -> None:
    text = (ROOT / "docs" / "parallel.md").read_text()
    profile = SimpleNamespace(
        name="example", memory_bytes=80 * 10**9, devices=8, link_alpha_us=6.0, link_gb_per_s=450.0
    )
    values = {
        "one all-reduce, decode (µs)": 1e3 * all_reduce_ms(8192 * 2, 8, profile),
        "all layers, decode (ms)": layers_reduce_ms(80, 8192, 1, 8, profile),
        "one all-reduce, prefill (µs)": 1e3 * all_reduce_ms(8192 * 128 * 2, 8, profile),
        "all layers, prefill (ms)": layers_reduce_ms(80, 8192, 128, 8, profile),
        "pipeline of 8 stages, decode (ms)": pipeline_ms(0.0, 8, 8192 * 2, profile),
    }
    rows = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([\d.]+) \|$", text, re.MULTILINE))
    assert rows.keys() == values.keys()
    for name, value in values.items():
        digits = len(rows[name].partition(".")[2])
        assert float(rows[name]) == round(value, digits), name
