"""Predictions for targets elsewhere: against sums by hand, published figures, and what must hold whatever the priors are."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from paretune.common.errors import Infeasible, UsageError
from paretune.hardware_profiles import Profile, load_profile
from paretune.hardware_profiles.library import FOLDER
from paretune.objectives.prediction.parallel import degree_fact
from paretune.objectives.prediction.predict import forward, predict
from paretune.objectives.prediction.roofline import (
    Step,
    activation_bytes,
    resident_bytes,
    seconds_per_byte,
    time_of,
    works,
)
from paretune.spaces.candidate import FP32, Candidate, Format, Layer, Pattern, Shape

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TWO = Shape(2, 64, 128, 4, 2, 16, 256)
LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 128, 32000, tied=False)
LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128, 32000, tied=False)
HALF, INT8, INT4 = Format(16), Format(8, 0), Format(4, 32)


def whole(shape: Shape, form: Format, pattern: Pattern | None = None, table: Format | None = None) -> Candidate:
    """The full size in one precision."""
    layer = Layer(shape.ffn, shape.kv_heads, form, form, pattern or Pattern())
    return Candidate((layer,) * shape.layers, form, table or form)


def target(**changes: object) -> Profile:
    """A CPU of 1 GB/s and 1 TFLOP/s in all arithmetic: everything waits for memory."""
    figures = {"bandwidth_gb_per_s": 1.0, "peak_fp32_tflops": 1.0, "peak_int8_tops": 1.0}
    settings = {
        "name": "by-hand",
        "description": "a target whose figures make sums easy",
        "engine_version": "1",
        "at_hand": False,
        "threads": 1,
        "cores": 1,
        "cpu": "none",
        "memory_bytes": 10**9,
        "overhead_us_per_op": (1.0, 2.0, 5.0),
        "compute_efficiency": (0.25, 0.5, 1.0),
        "bandwidth_efficiency": (0.25, 0.5, 1.0),
        "weight_formats": ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32", "fp16/fp32", "int8/fp32"),
        **figures,
        **changes,
        "source": "a test",
    }
    names = [
        name for name in settings if name.startswith(("bandwidth", "peak", "power", "price", "link", "over", "comp"))
    ]
    return Profile.model_validate({**settings, "sources": dict.fromkeys(names, "a test")})


# name, operations, bytes of weights, of the cache, of activations: fp32, one token after 10, of shape TWO.
NORM = ("norm", 256, 0, 0, 512)
BY_HAND = [
    NORM,
    ("qkv", 2 * 128 * 64, 4 * 128 * 64, 0, 4 * (128 + 64)),
    ("attention", 4 * 11 * 64, 0, 4 * (2 * 11 * 32 + 2 * 32), 4 * 2 * 64),
    ("o", 2 * 64 * 64, 4 * 64 * 64, 0, 4 * (64 + 64)),
    NORM,
    ("gate_up", 2 * 256 * 64, 4 * 256 * 64, 0, 4 * (256 + 64)),
    ("activation", 5 * 128, 0, 0, 4 * 3 * 128),
    ("down", 2 * 64 * 128, 4 * 64 * 128, 0, 4 * (64 + 128)),
]
EMBEDDING = ("embedding", 0, 4 * 64, 0, 4 * 64)
HEAD = ("head", 2 * 256 * 64, 4 * 256 * 64, 0, 4 * (256 + 64))
OPS_BY_HAND = [EMBEDDING, *BY_HAND, *BY_HAND, NORM, HEAD]


def test_every_op_is_counted_as_by_hand() -> None:
    found = works(whole(TWO, FP32), TWO, target(), Step(1, 10))
    assert [(w.name, w.flops, w.weight_bytes, w.cache_bytes, w.other_bytes) for w in found] == OPS_BY_HAND
    assert [w.layer for w in found] == [None] + [0] * 8 + [1] * 8 + [None, None]


def test_a_step_that_waits_for_memory_takes_bytes_over_bandwidth_and_overheads() -> None:
    total = sum(op[2] + op[3] + op[4] for op in OPS_BY_HAND)
    assert total == 381_696
    found = predict(target(), whole(TWO, FP32), TWO, context=10)["decode_ms_per_token"]
    assert found.value == pytest.approx(total / 0.5e9 * 1e3 + 19 * 2e-3)
    assert found.low == pytest.approx(total / 1e9 * 1e3 + 19 * 1e-3)
    assert found.high == pytest.approx(total / 0.25e9 * 1e3 + 19 * 5e-3)
    assert (found.unit, found.provenance) == ("ms/token", "predicted")
    assert "memory bounds it" in found.note


def test_a_step_that_waits_for_arithmetic_takes_operations_over_the_peak() -> None:
    slow = target(peak_fp32_tflops=1e-6, peak_int8_tops=None)
    total = sum(op[1] for op in OPS_BY_HAND)
    assert total == 188_416
    found = predict(slow, whole(TWO, FP32), TWO, context=10)["decode_ms_per_token"]
    table = 512 / 0.5e9 * 1e3  # the embedding's rows take no arithmetic
    assert found.value == pytest.approx(total / 0.5e6 * 1e3 + table + 19 * 2e-3)
    assert "arithmetic bounds it" in found.note


def test_prefill_by_hand() -> None:
    """Three tokens in each of two sequences: six rows; tokens see 1, 2 and 3 of their own sequence; logits of all."""
    found = {w.name: w for w in works(whole(TWO, FP32), TWO, target(), Step(3, 0, 2))}
    assert found["qkv"].flops == 2 * 6 * 128 * 64
    assert found["qkv"].weight_bytes == 4 * 128 * 64
    assert found["attention"].flops == 4 * 64 * 2 * (1 + 2 + 3)
    assert found["attention"].cache_bytes == 4 * (2 * 2 * 3 * 32 + 2 * 6 * 32)
    assert found["head"].flops == 2 * 6 * 256 * 64
    assert found["embedding"].other_bytes == 4 * 6 * 64


@pytest.mark.parametrize(
    ("form", "bits", "scale_every"),
    [(Format(8, 32, "int8"), 8, 32), (INT4, 4, 32), (Format(4, 64, "int8"), 4, 64), (Format(4, 0), 4, None)],
)
def test_scales_count_beside_the_codes(form: Format, bits: int, scale_every: int | None) -> None:
    found = {w.name: w for w in works(whole(TWO, form), TWO, target(), Step(1, 0))}
    for name, n, k in (("qkv", 128, 64), ("o", 64, 64), ("gate_up", 256, 64), ("down", 64, 128), ("head", 256, 64)):
        assert found[name].weight_bytes == n * k * bits // 8 + 4 * n * (k // (scale_every or k)), name


def test_layers_of_different_widths_and_precisions_are_each_counted() -> None:
    mixed = Candidate((Layer(128, 2, FP32, INT4), Layer(64, 1, INT4, FP32)), FP32, FP32)
    alone = [works(Candidate((layer,), FP32, FP32), TWO, target(), Step(1, 5)) for layer in mixed.layers]
    found = works(mixed, TWO, target(), Step(1, 5))
    assert [replace(w, layer=None) for w in found[1:9]] == [replace(w, layer=None) for w in alone[0][1:9]]
    assert [replace(w, layer=None) for w in found[9:17]] == [replace(w, layer=None) for w in alone[1][1:9]]
    assert found[10].flops == 2 * (32 + 2 * 16) * 64


def test_batches_share_the_weights_but_not_the_cache() -> None:
    one, many = (works(whole(TWO, FP32), TWO, target(), Step(1, 10, batch)) for batch in (1, 8))
    assert sum(w.weight_bytes for w in one[1:]) == sum(w.weight_bytes for w in many[1:])
    assert 8 * sum(w.cache_bytes for w in one) == sum(w.cache_bytes for w in many)
    single, batched = (predict(target(), whole(TWO, FP32), TWO, batch=b) for b in (1, 8))
    assert single["decode_ms_per_token"].value < batched["decode_ms_per_token"].value
    assert single["throughput_tokens_per_s"].value < batched["throughput_tokens_per_s"].value
    step = batched["decode_ms_per_token"]
    speed = batched["throughput_tokens_per_s"]
    assert (speed.low, speed.value, speed.high) == pytest.approx((8e3 / step.high, 8e3 / step.value, 8e3 / step.low))


def test_memory_by_hand() -> None:
    weights = sum(op[2] for op in OPS_BY_HAND[1:])  # the table is the tied head's
    cache = 2 * 2 * 11 * 32 * 4
    assert resident_bytes(whole(TWO, FP32), TWO, target(), Step(1, 10)) == (weights, cache, 4 * 3 * 128)
    untied = replace(TWO, tied=False)
    assert resident_bytes(whole(TWO, FP32), untied, target(), Step(1, 10))[0] == weights + 4 * 256 * 64
    two_tables = replace(whole(TWO, FP32), embedding_format=INT4)
    assert resident_bytes(two_tables, TWO, target(), Step(1, 10))[0] == weights + 256 * 64 // 2 + 4 * 256 * 2
    found = predict(target(), whole(TWO, FP32), TWO, prompt=8, context=10)["peak_memory_bytes"]
    logits = 8 * max(4 * 3 * 128, 4 * 256)
    assert found.low == weights + max(cache + 4 * 3 * 128, 2 * 2 * 8 * 32 * 4 + logits)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_target_predicts(name: str, tmp_path: Path) -> None:
    profile = load_profile(name, tmp_path)
    shape = Shape(6, 256, 768, 8, 4, 32, 4096)
    for form in (FP32, HALF, Format(8, 32, "int8"), Format(4, 32, "int8"), Format(8, 0, "static")):
        found = predict(profile, whole(shape, form), shape)
        expected = {"decode_ms_per_token", "ttft_ms", "throughput_tokens_per_s", "peak_memory_bytes"}
        expected |= {"energy_j_per_token"} if profile.power_watts else set()
        expected |= {"usd_per_million_tokens"} if profile.price_usd_per_hour else set()
        expected |= {"tensor_parallel_degree"} if profile.devices > 1 else set()
        assert found.keys() == expected
        assert found.pop("tensor_parallel_degree", None) in (None, degree_fact(1, profile))
        for m in found.values():
            assert 0 < m.low < m.value < m.high < math.inf
            assert m.provenance == "predicted"
        assert found["ttft_ms"].value > found["decode_ms_per_token"].value


@pytest.mark.parametrize("name", NAMES)
def test_fewer_bits_are_never_slower_at_decoding_where_the_target_has_the_kernel(name: str, tmp_path: Path) -> None:
    profile = load_profile(name, tmp_path).model_copy(update={"memory_bytes": 10**12})
    has = set(profile.weight_formats)
    half = [f for f in (Format(16), Format(16, half="bf16")) if f.kernel in has][:1]
    ladders = {
        "fp32": [FP32, *half, *(f for f in (Format(8, 32), Format(4, 32)) if f.kernel in has)],
        "int8": [f for f in (Format(8, 32, "int8"), Format(4, 32, "int8")) if f.kernel in has],
    }
    for ladder in ladders.values():
        found = [predict(profile, whole(LLAMA_7B, form), LLAMA_7B)["decode_ms_per_token"] for form in ladder]
        for wider, narrower in itertools.pairwise(found):
            assert narrower.value <= wider.value and narrower.low <= wider.low and narrower.high <= wider.high
    faster = predict(profile, whole(LLAMA_7B, ladders["fp32"][-1]), LLAMA_7B)["decode_ms_per_token"].value
    if len({f for f in ladders["fp32"] if profile.computes_half or f.bits != 16}) > 1:
        assert faster < predict(profile, whole(LLAMA_7B, FP32), LLAMA_7B)["decode_ms_per_token"].value


def test_what_is_only_stored_in_16_bits_costs_what_fp32_does(tmp_path: Path) -> None:
    pi, a100 = load_profile("raspberry-pi-5", tmp_path), load_profile("nvidia-a100", tmp_path)
    plain, half = whole(TWO, FP32), whole(TWO, HALF, table=FP32)
    untied = replace(TWO, tied=False)
    assert predict(pi, plain, untied) == predict(pi, half, untied)
    wide, narrow = (predict(a100, c, LLAMA_7B) for c in (whole(LLAMA_7B, FP32), whole(LLAMA_7B, HALF)))
    assert narrow["decode_ms_per_token"].value < 0.6 * wide["decode_ms_per_token"].value
    assert narrow["peak_memory_bytes"].value < 0.6 * wide["peak_memory_bytes"].value
    assert (activation_bytes(plain, a100), activation_bytes(half, a100), activation_bytes(half, pi)) == (4, 2, 4)


def test_int8_without_integer_arithmetic_is_widened_in_every_call_on_a_cpu() -> None:
    """What the embedded teacher showed: 7 ms per token instead of 0.25."""
    floating, integer = (whole(LLAMA_7B, Format(8, 32, activation)) for activation in ("fp32", "int8"))
    profile = target(memory_bytes=10**11)
    slow, fast = (predict(profile, c, LLAMA_7B) for c in (floating, integer))
    assert slow["decode_ms_per_token"].value > 5 * fast["decode_ms_per_token"].value
    assert slow["peak_memory_bytes"].low == fast["peak_memory_bytes"].low


def test_a_pattern_without_kernel_gains_no_time(tmp_path: Path) -> None:
    a100, t4, pi = (load_profile(name, tmp_path) for name in ("nvidia-a100", "nvidia-t4", "raspberry-pi-5"))
    two_four, half_zero = Pattern("2:4", 0.5), Pattern("unstructured", 0.5)

    def decode(profile: Profile, form: Format, pattern: Pattern | None = None) -> float:
        return predict(profile, whole(TWO, form, pattern), TWO)["decode_ms_per_token"].value

    for profile in (a100, t4, pi):
        for pattern in (half_zero, Pattern("block", 0.5), Pattern.below(0.67), Pattern("given")):
            assert decode(profile, HALF, pattern) == decode(profile, HALF)
    assert decode(t4, HALF, two_four) == decode(t4, HALF)
    assert decode(a100, INT4, two_four) == decode(a100, INT4)
    dense, sparse = (whole(LLAMA_7B, HALF, p) for p in (None, two_four))
    assert predict(a100, sparse, LLAMA_7B)["ttft_ms"].value < predict(a100, dense, LLAMA_7B)["ttft_ms"].value
    ratio = sum(w.weight_bytes for w in works(whole(TWO, HALF, two_four), TWO, a100, Step(1, 0)) if w.name == "down")
    assert ratio == 2 * 64 * 128 * 2 * (8 + 1) / 16  # two layers; half of the values, and 2 bits for each of them


# Tokens per second at batch 1 on A100 80GB after a prompt of 5 tokens: README of gpt-fast, commit 0f925b5.
PUBLISHED = [
    (LLAMA_7B, HALF, 1, 104.9),
    (LLAMA_7B, INT8, 1, 155.58),
    (LLAMA_7B, INT4, 1, 196.80),
    (LLAMA_70B, INT8, 1, 19.13),
    (LLAMA_70B, INT4, 1, 25.25),
    (LLAMA_70B, HALF, 2, 21.32),
]


@pytest.mark.parametrize(("shape", "form", "devices", "published"), PUBLISHED)
def test_published_decode_speeds_lie_in_the_interval(
    shape: Shape, form: Format, devices: int, published: float, tmp_path: Path
) -> None:
    found = predict(load_profile("nvidia-a100", tmp_path), whole(shape, form, table=HALF), shape, prompt=5, context=100)
    speed = found["throughput_tokens_per_s"]
    assert speed.low < published < speed.high
    assert abs(speed.value / published - 1) < 0.5
    assert (f"on {devices} devices" in speed.note) == (devices > 1)
    other = predict(load_profile("nvidia-h100", tmp_path), whole(shape, form, table=HALF), shape, prompt=5, context=100)
    assert other["throughput_tokens_per_s"].value > speed.value
    slower = load_profile("jetson-orin-nano", tmp_path).model_copy(update={"memory_bytes": 10**12})
    assert predict(slower, whole(shape, form, table=HALF), shape)["throughput_tokens_per_s"].high < published


def test_the_published_order_is_the_predicted_one(tmp_path: Path) -> None:
    a100 = load_profile("nvidia-a100", tmp_path)
    found = [
        predict(a100, whole(shape, form, table=HALF), shape)["throughput_tokens_per_s"].value
        for shape, form, devices, _ in PUBLISHED
        if devices == 1
    ]
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=[p[3] for p in PUBLISHED].__getitem__)


def test_what_does_not_fit_is_infeasible_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match=r"raspberry-pi-5 has 8\.00 GB.*needs 2\d\.\d\d GB"):
        predict(load_profile("raspberry-pi-5", tmp_path), whole(LLAMA_7B, FP32), LLAMA_7B)
    predict(load_profile("raspberry-pi-5", tmp_path), whole(LLAMA_7B, INT4), LLAMA_7B)
    one = load_profile("nvidia-a100", tmp_path).model_copy(update={"devices": 1})
    predict(one, whole(LLAMA_7B, HALF), LLAMA_7B, batch=8)
    with pytest.raises(Infeasible):
        predict(one, whole(LLAMA_7B, HALF), LLAMA_7B, batch=8, context=16_000)


def test_more_devices_are_taken_only_where_one_is_too_small(tmp_path: Path) -> None:
    a100 = load_profile("nvidia-a100", tmp_path)
    assert "devices" not in predict(a100, whole(LLAMA_7B, HALF), LLAMA_7B)["decode_ms_per_token"].note
    found = predict(a100, whole(LLAMA_70B, HALF), LLAMA_70B)
    assert found["peak_memory_bytes"].low < a100.memory_bytes
    step = Step(1, 128)
    one, two = (forward(a100, whole(LLAMA_70B, HALF), LLAMA_70B, step, degree) for degree in (1, 2))
    assert one.likely / 2 < two.likely < one.likely
    assert found["decode_ms_per_token"].value == two.likely
    per_hour = found["usd_per_million_tokens"].value / (two.likely / 3600)
    assert per_hour == pytest.approx(1e3 * 2 * 2.5)
    odd = replace(LLAMA_70B, heads=56, kv_heads=7)
    assert "on 7 devices" in predict(a100, whole(odd, HALF), odd)["decode_ms_per_token"].note


def test_a_quantization_group_is_not_split_between_devices(tmp_path: Path) -> None:
    """Seven KV heads allow 1 or 7 devices, and one is too small: the FFN's part must be whole groups of 256."""
    shape = replace(LLAMA_70B, heads=56, kv_heads=7)
    small = load_profile("nvidia-a100", tmp_path).model_copy(update={"memory_bytes": 30 * 10**9})
    for blocks, fits in ((112, True), (113, False)):
        candidate = Candidate((Layer(256 * blocks, 7, HALF, Format(8, 256)),) * 80, HALF, HALF)
        if fits:
            assert "on 7 devices" in predict(small, candidate, shape)["decode_ms_per_token"].note
        else:
            with pytest.raises(Infeasible):
                predict(small, candidate, shape)


def test_a_profile_without_figures_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"local-cpu lacks bandwidth_gb_per_s and peak_fp32_tflops.*hardware calibrate"
    ):
        predict(load_profile("local-cpu", tmp_path), whole(TWO, FP32), TWO)


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"context": -1}, {"batch": 0}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        predict(target(), whole(TWO, FP32), TWO, **wrong)


def test_an_op_is_on_either_side_of_the_ridge() -> None:
    """At 1 TFLOP/s and 1 GB/s the ridge lies at 1000 operations per byte."""
    work = works(whole(TWO, FP32), TWO, target(), Step(1, 0))[2]
    assert work.intensity == pytest.approx(2 * 128 * 64 / (4 * 128 * 64 + 4 * 192))
    assert time_of(work, target()).waits == "memory"
    heavy = replace(work, flops=work.bytes * 1001)
    assert time_of(heavy, target()).waits == "arithmetic"
    assert time_of(heavy, target()).likely == pytest.approx(heavy.flops / 0.5e12 * 1e3 + 2e-3)


def test_what_fits_the_cache_is_read_from_it() -> None:
    """10 GB/s from a cache of 1024 bytes: all of it up to that per step, half at half more, none from twice."""
    figures = {"cache_bytes": 1024, "cache_gb_per_s": 10.0}
    profile = Profile.model_validate(
        target().model_dump() | figures | {"sources": {**target().sources, **dict.fromkeys(figures, "a test")}}
    )
    for share, step_bytes in ((1.0, 1000), (1.0, 1024), (0.5, 1536), (0.0, 2048), (0.0, 10**9)):
        slow, likely, fast = seconds_per_byte(profile, step_bytes)
        assert fast == pytest.approx(share * 1e-10 + (1 - share) * 1e-9)
        assert likely == pytest.approx(2 * fast)
        assert slow == pytest.approx(4e-9), "the pessimistic end knows no cache"
    large = Profile.model_validate(profile.model_dump() | {"cache_bytes": 10**6})
    with_cache, without = (predict(p, whole(TWO, FP32), TWO)["decode_ms_per_token"] for p in (large, target()))
    assert with_cache.value < 0.4 * without.value and with_cache.high == without.high
