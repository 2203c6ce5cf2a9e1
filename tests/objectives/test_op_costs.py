"""From an engine's trace to findings, on traces made by hand: what is expected is worked out another way."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import binom, trim_mean

from paretune.engines.onnxruntime.node_times import DECODE, PREFILL, WARM_UP, rows_of, trimmed_mean
from paretune.objectives.profiler.node_times import median_interval
from paretune.objectives.profiler.op_costs import (
    Node,
    OpCost,
    Roof,
    by_group,
    by_layer,
    by_op,
    by_place,
    op_costs,
    totals,
)
from paretune.objectives.profiler.places import DROPPED, NARROWED, Findings, Place, best_places, findings_of, options
from paretune.spaces import Candidate, Format, Layer

INT8, INT4 = Format(8, 32, "int8"), Format(4, 32, "int8")
ROOF = Roof(10.0, 100.0, 400.0)
PLAIN = Candidate((Layer(96, 2), Layer(96, 2)))


# the engine's trace


def event(kind: str, name: str, start: int, duration: int, **facts: Any) -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": start, "dur": duration, "ph": "X", "args": facts}


def node_event(name: str, op: str, start: int, duration: int, index: int, shape: list[int]) -> dict[str, Any]:
    facts: dict[str, Any] = {"op_name": op, "node_index": str(index), "activation_size": "256", "output_size": "512"}
    facts |= {"input_type_shape": [{"float": [1, 1, 64]}], "output_type_shape": [{"float": shape}]}
    return event("Node", f"{name}_kernel_time", start, duration, **facts)


def trace(durations: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One run after the other, 1000 µs apart; in each the ops of `durations` with the time that they take in it."""
    runs = len(next(iter(durations.values())))
    found = [event("Session", "model_loading_uri", 0, 10)]
    for run in range(runs):
        start = 1000 * (run + 1)
        found.append(event("Session", "model_run", start, 900))
        for i, (name, taken) in enumerate(durations.items()):
            found.append(
                node_event(
                    name, "MatMul" if name.endswith("proj") else "Mul", start + 50 * i, taken[run], i, [1, 1, 96]
                )
            )
    return found[::-1]  # the order in the file does not matter


def test_the_nodes_of_a_trace_are_told_by_phase_and_the_warm_up_is_left_out() -> None:
    events = trace({"/a/up_proj": [999, 7, 2, 4], "/a/product": [999, 3, 1, 1]})
    found = rows_of(events, [WARM_UP, PREFILL, DECODE, DECODE])
    assert [(r["phase"], r["name"], r["op"], r["ms"]) for r in found["rows"]] == [
        (PREFILL, "/a/up_proj", "MatMul", pytest.approx(0.007)),
        (PREFILL, "/a/product", "Mul", pytest.approx(0.003)),
        (DECODE, "/a/up_proj", "MatMul", pytest.approx(0.003)),
        (DECODE, "/a/product", "Mul", pytest.approx(0.001)),
    ]
    assert found["run_ms"] == {PREFILL: 0.9, DECODE: 0.9}
    first = found["rows"][0]
    assert (first["inputs"], first["output"], first["moved_bytes"]) == ([[1, 1, 64]], [1, 1, 96], 768)


def test_two_nodes_of_one_name_stay_two() -> None:
    events = [event("Session", "model_run", 0, 90), *(node_event("", "Mul", 10 * i, 5, i, [1]) for i in (1, 2))]
    assert len(rows_of(events, [DECODE])["rows"]) == 2


def test_a_trace_that_lacks_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 4 runs, but has 3"):
        rows_of(trace({"/a/up_proj": [1, 2, 3]}), [WARM_UP, PREFILL, DECODE, DECODE])


def test_the_trimmed_mean_is_that_of_scipy() -> None:
    source = random.Random(1)
    for n in (1, 5, 10, 23, 120):
        values = [source.lognormvariate(0, 1) for _ in range(n)]
        assert trimmed_mean(values) == pytest.approx(trim_mean(values, 0.25))
    assert trimmed_mean([1.0] * 4 + [1e6]) == 1.0  # one odd run in five moves nothing


@pytest.mark.parametrize("n", [6, 10, 72, 240])
def test_the_interval_of_a_median_covers_95_percent_and_the_next_narrower_one_does_not(n: int) -> None:
    _, _, low, high = median_interval([float(i) for i in range(n)], "ms")
    rank = int(low)
    assert high == n - 1 - rank
    assert binom.cdf(rank, n, 0.5) <= 0.025 < binom.cdf(rank + 1, n, 0.5)


# places, arithmetic and bytes


def nodes(**ms: float) -> list[Node]:
    """A decode step of two layers of 64 hidden, FFN 96, 2 KV groups of 2 heads of 16, vocabulary 288, after 40 positions."""
    times = {"qkv": 0.2, "gqa": 0.1, "o": 0.1, "up": 0.5, "silu": 0.05, "down": 0.5, "head": 0.6} | ms
    found = [Node("/model/embed_tokens", "Gather", "decode", 0.01, ((1, 1),), (1, 1, 64), 264)]
    for i in range(2):
        path = f"/model/layers.{i}"
        cache = ((1, 1, 128), (1, 2, 64, 16), (1, 2, 64, 16))
        found += [
            Node(
                f"{path}/input_layernorm",
                "SimplifiedLayerNormalization",
                "decode",
                0.02,
                ((1, 1, 64),),
                (1, 1, 64),
                512,
            ),
            Node(f"{path}/attn/qkv_proj", "MatMul", "decode", times["qkv"], ((1, 1, 64),), (1, 1, 128), 768),
            Node(f"{path}/attn/gqa", "GroupQueryAttention", "decode", times["gqa"], cache, (1, 1, 64), 99_999),
            Node(f"{path}/attn/o_proj", "MatMul", "decode", times["o"], ((1, 1, 64),), (1, 1, 64), 512),
            Node(f"{path}/mlp/up_proj", "MatMul", "decode", times["up"], ((1, 1, 64),), (1, 1, 96), 640),
            Node("fused_token_7", "QuickGelu", "decode", times["silu"], ((1, 1, 96),), (1, 1, 96), 768),
            Node(f"{path}/mlp/down_proj", "MatMul", "decode", times["down"], ((1, 1, 96),), (1, 1, 64), 640),
        ]
    found.append(
        Node("/model/norm", "SkipSimplifiedLayerNormalization", "decode", 0.01, ((1, 1, 64),), (1, 1, 64), 512)
    )
    return [*found, Node("renamed", "MatMul", "decode", times["head"], ((1, 1, 64),), (1, 1, 288), 1408)]


def costs(candidate: Candidate = PLAIN, **ms: float) -> list[OpCost]:
    return op_costs(nodes(**ms), candidate, {"decode": 41.0})


def test_nodes_are_placed_by_name_and_renamed_ones_by_what_comes_before_them() -> None:
    found = costs()
    assert [(c.layer, c.group) for c in found if c.op == "QuickGelu"] == [(0, "ffn"), (1, "ffn")]
    assert (found[-1].layer, found[-1].group) == (None, "head")
    assert {by_place(c) for c in found} == {"embedding", "head"} | {
        f"layer {i} {group}" for i in (0, 1) for group in ("attention", "ffn")
    }


def test_a_node_of_a_layer_that_the_candidate_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have 1 layers, but the engine ran /model/layers\.1/input_layernorm"):
        costs(Candidate((Layer(96, 2),)))


def test_arithmetic_of_a_matrix_is_counted_as_loops_do() -> None:
    rows, inner, columns = 1, 64, 96
    loops = sum(2 for _ in range(rows) for _ in range(columns) for _ in range(inner))
    up = next(c for c in costs() if c.name.endswith("up_proj"))
    assert (up.flops, up.matrix) == (loops, (96, 64))
    assert up.bytes == 4 * (inner * columns + inner + columns)  # weights, in, out


def test_attention_reads_what_it_attends_to_not_the_whole_buffer() -> None:
    heads, kv_heads, size, keys = 4, 2, 16, 41
    gqa = next(c for c in costs() if c.op == "GroupQueryAttention")
    assert gqa.flops == sum(2 * size + 2 * size for _ in range(heads) for _ in range(keys))
    assert gqa.bytes == 4 * (2 * keys * kv_heads * size + 128 + 64)


@pytest.mark.parametrize(
    ("form", "bits"), [(Format(16), 32), (INT8, 8 + 1), (INT4, 4 + 1), (Format(4, 16, "int8"), 4 + 2), (Format(), 32)]
)
def test_weights_take_what_the_engine_computes_with(form: Format, bits: int) -> None:
    """A float32 scale per group of 32 is one more bit per weight, per group of 16 two; 16-bit floats are widened at load."""
    candidate = replace(PLAIN, head_format=form)
    head = next(c for c in costs(candidate) if c.group == "head" and c.matrix)
    assert head.bytes - 1408 == 64 * 288 * bits / 8


def test_totals_add_up_and_sit_under_the_roof_as_worked_out_by_hand() -> None:
    found = costs()
    for label in (by_op, by_group, by_layer, by_place):
        parts = totals(found, ROOF, "decode", label)
        assert sum(t.ms for t in parts) == pytest.approx(sum(n.ms for n in nodes()))
        assert sum(t.share for t in parts) == pytest.approx(1)
        assert [t.ms for t in parts] == sorted((t.ms for t in parts), reverse=True)
    head = next(c for c in found if c.name == "renamed")
    (alone,) = totals([head], ROOF, "decode", by_op)
    assert alone.bound == "memory" and alone.roof_ms == pytest.approx((64 * 288 * 4 + 1408) / 10e9 * 1e3)
    assert alone.efficiency == pytest.approx(alone.roof_ms / 0.6)
    (busy,) = totals([replace(head, flops=1e9)], ROOF, "decode", by_op)
    assert busy.bound == "compute" and busy.roof_ms == pytest.approx(10.0)
    assert totals(found, ROOF, "prefill", by_op) == ()


@pytest.mark.parametrize("figure", [0.0, -1.0, math.nan, math.inf])
def test_a_roof_of_nothing_is_refused(figure: float) -> None:
    with pytest.raises(ValueError, match="fp32_gflop_per_s of a roofline must be finite and more than 0"):
        Roof(10.0, figure, 100.0)


# where compression would pay


def changes(found: list[OpCost], slowdown: float = 1.0) -> tuple[Place, ...]:
    return options(found, ROOF, (INT8, INT4), {"decode": slowdown})


def place(places: tuple[Place, ...], text: str) -> Place:
    return next(p for p in places if p.text == text)


def test_what_fewer_bits_save_lies_between_the_same_share_of_the_roof_and_the_roofs_difference() -> None:
    saved = place(changes(costs()), "head to int8").decode_ms
    before, after = 64 * 288 * 4 + 1408, 64 * 288 * 9 / 8 + 1408
    difference, share = (before - after) / 10e9 * 1e3, 0.6 * (1 - after / before)
    assert difference < share
    assert (saved.low, saved.high) == pytest.approx((difference, share))
    assert saved.provenance == "predicted" and saved.value == pytest.approx((difference + share) / 2)


def test_where_arithmetic_binds_fewer_bits_may_save_nothing() -> None:
    busy = [replace(c, flops=1e9) for c in costs()]
    saved = place(changes(busy), "head to int4").decode_ms
    assert saved.low == saved.value == 0
    assert saved.high == pytest.approx(0.6 * (1 - ROOF.fp32_gflop_per_s / ROOF.int8_gop_per_s))


def test_a_dropped_layer_saves_what_its_ops_take() -> None:
    layer = 0.02 + 0.2 + 0.1 + 0.1 + 0.5 + 0.05 + 0.5
    saved = place(changes(costs()), "layer 1 dropped").decode_ms
    assert (saved.low, saved.value, saved.high) == pytest.approx((layer, layer, layer))
    slow = place(changes(costs(), slowdown=2.0), "layer 1 dropped").decode_ms
    assert (slow.low, slow.high) == pytest.approx((layer / 2, layer))


def test_a_narrower_ffn_saves_a_quarter_of_its_ops() -> None:
    saved = place(changes(costs()), f"ffn {NARROWED}").decode_ms
    assert saved.value == pytest.approx(2 * (0.5 + 0.05 + 0.5) / 4)


def test_what_has_few_bits_already_is_no_place_for_them() -> None:
    layer = Layer(96, 2, INT4, INT8)
    texts = {p.text for p in changes(costs(Candidate((layer, layer))))}
    assert "ffn to int4" in texts and not {"ffn to int8", "attention to int8", "attention to int4"} & texts


def test_swapped_ops_change_the_ranking() -> None:
    """Negative control: the same trace with the times of FFN and head exchanged."""
    first = findings_of(changes(costs()))
    swapped = findings_of(changes(costs(up=0.15, down=0.15, head=2.0)))
    assert [name for name, _ in first.groups] == ["ffn", "head", "attention"]
    assert [name for name, _ in swapped.groups] == ["head", "attention", "ffn"]
    assert first.groups != swapped.groups
    assert best_places(changes(costs()))[0].what != best_places(changes(costs(up=0.15, down=0.15, head=2.0)))[0].what


def test_layers_that_noise_alone_tells_apart_are_one_place() -> None:
    uneven = [replace(c, ms=c.ms * (1.01 if c.layer == 1 else 1)) for c in costs()]
    best = best_places(changes(uneven, slowdown=1.1))
    assert [p.text for p in best if p.change == DROPPED] == ["one of 2 layers dropped"]
    far = [replace(c, ms=c.ms * (3 if c.layer == 1 else 1)) for c in costs()]
    assert [p.text for p in best_places(changes(far, slowdown=1.1)) if p.change == DROPPED] == [
        "layer 1 dropped",
        "layer 0 dropped",
    ]
    assert findings_of(changes(far)).layers[0][0] == 1


def test_at_most_five_places_and_none_that_saves_nothing() -> None:
    best = best_places(changes(costs()))
    assert len(best) == 5
    assert [p.decode_ms.value for p in best] == sorted((p.decode_ms.value for p in best), reverse=True)
    still = [replace(c, ms=0.0) for c in costs()]
    assert best_places(changes(still)) == () and findings_of(changes(still)) == Findings((), ())


def test_findings_survive_json_and_nonsense_does_not() -> None:
    found = findings_of(changes(costs()))
    assert Findings.from_dict(found.to_dict()) == found
    assert "quantized first: ffn" in found.text
    for wrong in ([["tail", 1.0]], [["ffn", -1.0]], [["ffn", math.nan]], [["ffn", 0.0]]):
        with pytest.raises(ValueError, match="findings name groups"):
            Findings.from_dict({"groups": wrong, "layers": []})
