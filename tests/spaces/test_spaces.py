"""The joint space against brute force: canonical keys, encoding, counting, and what a profile has no kernel for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.hardware_profiles.profile import Profile
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape, Space
from paretune.spaces.candidate import DENSE, FP32, group_for
from paretune.spaces.space import GROUP_SIZES, RATIOS

KERNELS = Profile.model_fields["weight_formats"].default
ALL_KERNELS = ("fp32/fp32", "int8/int8", "int8/fp32", "int4/int8", "int4/fp32")
EMBEDDED = Shape(6, 256, 768, 8, 4, 32, 4096)
SHAPES = {
    "embedded": EMBEDDED,
    "tiny": Shape(3, 64, 128, 4, 2, 16, 288),
    "odd_hidden": Shape(2, 48, 96, 3, 3, 16, 100, tied=False),  # groups can only be 16 here
    "one_layer": Shape(1, 320, 272, 5, 5, 64, 1000),
    "llama": Shape(16, 2048, 8192, 32, 8, 64, 128256),
}
KERNEL_SETS = [
    KERNELS,
    ALL_KERNELS,
    ("int4/int8",),
    ("fp32/fp32", "int8/int8"),
    ("int8/int8", "int4/fp32"),
    ("fp32/fp32",),
    ("int8/fp32",),
]


def spaces() -> st.SearchStrategy[Space]:
    return st.builds(
        Space.of,
        st.sampled_from(list(SHAPES.values())),
        st.sampled_from(KERNEL_SETS),
        st.booleans(),
        hidden=st.booleans(),
        given=st.booleans(),
    )


def strategy_of(space: Space) -> st.SearchStrategy[dict[str, Any]]:
    """Everything a sampler can propose."""
    return st.fixed_dictionaries(
        {
            name: st.integers(*bounds) if kind == "int" else st.sampled_from(bounds)
            for name, (kind, bounds) in space.distributions().items()
        }
    )


def proposals() -> st.SearchStrategy[tuple[Space, dict[str, Any]]]:
    return spaces().flatmap(lambda space: st.tuples(st.just(space), strategy_of(space)))


def every_candidate(space: Space) -> dict[str, Candidate]:
    """Brute force: decode every combination of the distributions."""
    ranges = {
        name: range(bounds[0], bounds[1] + 1) if kind == "int" else bounds
        for name, (kind, bounds) in space.distributions().items()
    }
    found = (space.decode(dict(zip(ranges, values, strict=True))) for values in itertools.product(*ranges.values()))
    return {candidate.key: candidate for candidate in found}


@given(proposals())
def test_decoded_candidates_are_canonical_and_canonical_is_idempotent(case: tuple[Space, dict[str, Any]]) -> None:
    space, params = case
    candidate = space.decode(params)
    assert candidate.canonical(space.shape) == candidate
    assert candidate.canonical(space.shape).key == candidate.key
    assert candidate.embedding_format.activation == "fp32", "a table look-up has no activations to round"


@given(proposals())
def test_encode_is_the_inverse_of_decode(case: tuple[Space, dict[str, Any]]) -> None:
    space, params = case
    candidate = space.decode(params)
    encoded = space.encode(candidate)
    assert space.decode(encoded) == candidate
    assert encoded.keys() == space.distributions().keys()
    for name, (kind, bounds) in space.distributions().items():
        assert bounds[0] <= encoded[name] <= bounds[1] if kind == "int" else encoded[name] in bounds, name


@given(proposals())
def test_json_round_trip_keeps_candidate_and_key(case: tuple[Space, dict[str, Any]]) -> None:
    candidate = case[0].decode(case[1])
    again = Candidate.from_json(candidate.to_json())
    assert again == candidate
    assert again.key == candidate.key
    assert Candidate.from_dict(json.loads(json.dumps(json.loads(candidate.to_json())))) == candidate


def matmul_formats(candidate: Candidate) -> set[Format]:
    return {candidate.head_format, *(f for x in candidate.layers for f in (x.attention_format, x.ffn_format))}


@given(proposals())
def test_nothing_is_proposed_that_the_profile_has_no_kernel_for(case: tuple[Space, dict[str, Any]]) -> None:
    space, params = case
    for form in matmul_formats(space.decode(params)):
        assert form.kernel in space.kernels


@given(
    st.sampled_from(list(SHAPES.values()))
    .map(lambda shape: Space.of(shape, ALL_KERNELS))
    .flatmap(lambda space: st.tuples(st.just(space), strategy_of(space)))
)
def test_int8_weights_never_meet_fp32_activations_where_int8_ones_are_to_be_had(
    case: tuple[Space, dict[str, Any]],
) -> None:
    assert "int8/fp32" not in {form.kernel for form in matmul_formats(case[0].decode(case[1]))}


@given(proposals())
def test_proposed_sizes_can_be_built(case: tuple[Space, dict[str, Any]]) -> None:
    space, params = case
    candidate, shape = space.decode(params), space.shape
    first = candidate.layers[0]
    assert space.min_depth <= len(candidate.layers) <= shape.layers
    assert first.ffn == shape.ffn or (first.ffn < shape.ffn and first.ffn % 32 == 0 and first.ffn >= 32)
    assert 1 <= first.kv_groups <= shape.kv_heads
    assert space.hidden_widths[0] <= candidate.width(shape) <= shape.hidden
    assert candidate.hidden == 0 or (candidate.hidden < shape.hidden and candidate.hidden % 32 == 0)
    for k in (candidate.width(shape), first.ffn, first.kv_groups * shape.heads_per_group * shape.head_dim):
        for form in matmul_formats(candidate):
            if form.bits != 32:
                assert k % group_for(form.group_size, k) == 0


def explicit_computation(candidate: Candidate, shape: Shape) -> Any:
    """What a candidate computes, spelled out independently of Format and Pattern equality."""

    def grid(form: Format, widths: tuple[int, ...], activations: bool) -> Any:
        if form.bits == 32:
            return "exact"
        groups = [max(g for g in (16, 32, 64, 128, 256) if g <= form.group_size and k % g == 0) for k in widths]
        return form.bits, groups, (form.activation, form.algorithm) if activations else None

    hidden = candidate.hidden or shape.hidden
    head = grid(candidate.head_format, (hidden,), True)
    embedding = grid(candidate.embedding_format, (hidden,), False)
    if shape.tied and head != "exact" and embedding != "exact" and head[:2] == embedding[:2]:
        head = (*head[:2], (head[2][0], "rtn"))  # one table
    layers = []
    for x in candidate.layers:
        q = x.kv_groups * shape.heads_per_group * shape.head_dim
        sparse = (
            x.pattern.kind
            if x.pattern.kind == "given"
            else None
            if x.pattern.kind == "none" or not x.pattern.ratio
            else (x.pattern.kind, x.pattern.score, 0.5 if x.pattern.kind == "2:4" else x.pattern.ratio)
        )
        layers.append(
            (
                x.ffn,
                x.kv_groups,
                grid(x.attention_format, (hidden, q), True),
                grid(x.ffn_format, (hidden, x.ffn), True),
                sparse,
            )
        )
    return repr((layers, head, embedding, hidden))


formats = st.builds(
    Format,
    st.sampled_from([4, 8, 32]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(["fp32", "int8"]),
    st.sampled_from(["rtn", "gptq"]),
)
patterns = st.builds(
    Pattern,
    st.sampled_from(["none", "2:4", "unstructured", "threshold", "block", "given"]),
    st.sampled_from([0.0, 0.5, 0.6]),
    st.sampled_from(["magnitude", "activation", "wanda", "sparsegpt"]),
)
raw_candidates = st.builds(
    lambda layer, depth, head, embedding, hidden: Candidate((layer,) * depth, head, embedding, hidden),
    st.builds(Layer, st.just(64), st.just(1), formats, formats, patterns),
    st.just(2),
    formats,
    formats,
    st.sampled_from([0, 32, 64]),
)


@given(raw_candidates, raw_candidates, st.booleans())
def test_equal_keys_mean_equal_computations(a: Candidate, b: Candidate, tied: bool) -> None:
    shape = Shape(2, 64, 64, 4, 2, 16, 288, tied=tied)
    same = a.canonical(shape).key == b.canonical(shape).key
    assert same == (explicit_computation(a, shape) == explicit_computation(b, shape))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: replace(x, attention_format=Format(32, 64, "int8")),
        lambda x: replace(x, attention_format=Format(32, 0, "fp32", "gptq")),
        lambda x: replace(x, pattern=Pattern("none", 0.7, "wanda")),
        lambda x: replace(x, pattern=Pattern("unstructured", 0.0, "wanda")),
    ],
)
def test_settings_without_effect_do_not_change_the_key(change: Any) -> None:
    layer = Layer(128, 2, FP32, Format(4, 32, "int8"), DENSE)
    shape = SHAPES["tiny"]
    changed = Candidate((change(layer),) * 3, Format(8, 64, "int8", "gptq"), Format(8, 128, "int8", "gptq"))
    plain = Candidate((layer,) * 3, Format(8, 64, "int8"), Format(8, 64, "fp32"))
    assert changed.canonical(shape).key == plain.canonical(shape).key
    assert changed != plain


def test_gptq_is_another_candidate_but_not_in_the_embedding_or_a_shared_table() -> None:
    plain, calibrated = Format(4, 64, "int8"), Format(4, 64, "int8", "gptq")
    for shape in (SHAPES["tiny"], replace(SHAPES["tiny"], tied=False)):
        base = Candidate((Layer(128, 2, plain, plain),) * 3, plain, Format(4, 64)).canonical(shape)
        head = replace(base, head_format=calibrated).canonical(shape)
        assert (head == base) == shape.tied
        assert replace(base, embedding_format=calibrated).canonical(shape) == base
        assert (
            replace(base, head_format=calibrated, embedding_format=Format(8, 64)).canonical(shape).quantizer == "gptq"
        )
        layers = replace(base, layers=(Layer(128, 2, calibrated, plain),) * 3).canonical(shape)
        assert layers.key != base.key
        assert layers.quantizer == "gptq" and base.quantizer != "gptq"
        assert "GPTQ" in layers.describe() and "GPTQ" not in base.describe()


def test_keys_of_candidates_without_gptq_are_those_of_version_0_1() -> None:
    """Kept measurements and studies are found by them."""
    plain = Format(4, 64, "int8")
    candidate = Candidate((Layer(128, 2, plain, FP32, Pattern("2:4", 0.5, "wanda")),) * 2, plain, Format(8, 64))
    assert candidate.key == "f85fc0e4794d4445"


def test_second_order_methods_are_left_out_where_they_take_minutes() -> None:
    assert all(Space.of(SHAPES[name], KERNELS).has_second_order for name in SHAPES if name != "llama")
    smol = Shape(30, 576, 1536, 9, 3, 64, 49152)  # SmolLM2-135M
    assert Space.of(smol, KERNELS).has_second_order
    large = Space.of(SHAPES["llama"], KERNELS)
    assert "quantizer" not in large.distributions()
    assert large.distributions()["score"] == ("categorical", ("magnitude", "wanda"))
    with pytest.raises(ValueError, match="outside this space"):
        large.encode(replace(large.baselines()[-1], head_format=Format(4, 64, "int8", "gptq")).canonical(large.shape))


def test_only_four_bit_matrices_are_proposed_with_gptq() -> None:
    found = every_candidate(Space(Shape(1, 64, 32, 2, 2, 16, 100), KERNELS, 1, 32, 2)).values()
    assert any(c.quantizer == "gptq" for c in found)
    for candidate in found:
        quantizers = {(f.bits, f.algorithm) for f in matmul_formats(candidate)}
        assert quantizers <= {(4, "rtn"), (4, "gptq"), (8, "rtn"), (32, "rtn")}
    assert "quantizer" not in Space(SHAPES["tiny"], ("fp32/fp32", "int8/int8"), 2, 32, 2).distributions()


def test_the_residual_stream_is_one_more_ordered_size_where_it_is_searched() -> None:
    space = Space.of(EMBEDDED, KERNELS, hidden=True)
    assert space.hidden_widths == (128, 192, 256)
    assert space.distributions()["hidden"] == ("int", (0, 2))
    params = space.encode(space.baselines()[1])
    assert params["hidden"] == 0, "what studies without it did"
    narrower = space.decode({**params, "hidden": 1})
    assert narrower.hidden == 192 and not narrower.is_full_size(EMBEDDED)
    assert narrower.describe().startswith("6 layers, FFN 768, 4 KV groups, hidden 192;")
    without = Space.of(EMBEDDED, KERNELS)
    assert without.decode(params) == space.decode(params) == space.baselines()[1]
    assert "hidden" not in space.baselines()[1].to_json(), "keys stay what they were"
    with pytest.raises(ValueError):
        without.encode(narrower)
    assert space.size() > 2 * without.size()


def test_finalists_treat_a_threshold_as_unstructured_and_a_given_mask_as_none() -> None:
    def stratum(pattern: Pattern) -> str:
        return Candidate((Layer(128, 2, pattern=pattern),)).stratum

    assert stratum(Pattern.below(0.7)) == stratum(Pattern("unstructured", 0.5)) == "unstructured/fp32"
    assert stratum(Pattern("given")) == stratum(DENSE) == "dense/fp32"


SMALL = [
    Space(Shape(2, 64, 32, 2, 2, 16, 100), KERNELS, 2, 32, 2),
    Space(Shape(2, 128, 32, 2, 2, 16, 100), KERNELS[::2], 1, 32, 2),
    Space(Shape(2, 256, 64, 2, 2, 16, 100), ("int8/int8", "int4/int8"), 1, 32, 1),
    Space(Shape(2, 48, 96, 3, 3, 16, 100), ("fp32/fp32", "int8/int8"), 2, 64, 3),
    Space(Shape(1, 128, 32, 2, 2, 16, 100), ALL_KERNELS[1:4], 1, 32, 2),
    Space(Shape(1, 128, 32, 2, 2, 16, 100, tied=False), ALL_KERNELS[::2], 1, 32, 2),
    Space(Shape(1, 9600, 32, 2, 2, 16, 100), KERNELS, 1, 32, 2),  # too wide for second-order methods
    Space(Shape(1, 128, 32, 2, 2, 16, 100), ("int8/int8", "int4/int8"), 1, 32, 2, min_hidden=32, given=True),
]


@pytest.mark.parametrize(
    "space",
    SMALL,
    ids=lambda s: (
        f"hidden{s.shape.hidden}-{len(s.hidden_widths)}-{len(s.kernels)}kernels-{'tied' if s.shape.tied else 'untied'}"
    ),
)
def test_size_counts_what_brute_force_enumerates(space: Space) -> None:
    found = every_candidate(space)
    assert space.size() == len(found) == len(set(found.values())), "distinct candidates have distinct keys"


@given(st.integers(1, 64).map(lambda n: 16 * n), st.sampled_from(GROUP_SIZES))
def test_group_repair_takes_the_largest_block_that_divides(k: int, group_size: int) -> None:
    repaired = group_for(group_size, k)
    divisors = [g for g in range(1, group_size + 1) if k % g == 0 and g in (16, 32, 64, 128, 256)]
    assert repaired == max(divisors)


def test_group_repair_refuses_widths_that_no_block_divides() -> None:
    with pytest.raises(ValueError, match=r"multiple of 16.*K=40"):
        group_for(32, 40)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kernels", KERNEL_SETS, ids=lambda k: "+".join(k))
def test_baselines_are_the_whole_teacher_at_every_precision(shape: Shape, kernels: tuple[str, ...]) -> None:
    space = Space.of(shape, kernels)
    found = space.baselines()
    names = {kernel.split("/")[0] for kernel in kernels}
    assert [c.head_format.name for c in found] == [n for n in ("fp32", "int8", "int4") if n in names]
    for candidate in found:
        assert candidate.is_full_size(shape)
        assert not candidate.is_sparse
        assert candidate.is_quantized == (candidate.head_format.bits != 32)
        assert {f.kernel for f in matmul_formats(candidate)} <= set(kernels)
        assert space.decode(space.encode(candidate)) == candidate


def test_full_size_and_sparsity_see_every_single_layer() -> None:
    shape = SHAPES["tiny"]
    whole = Layer(128, 2)
    for cut in (replace(whole, ffn=96), replace(whole, kv_groups=1)):
        assert not Candidate((whole, cut, whole)).is_full_size(shape)
    assert Candidate((whole,) * 3, hidden=64).is_full_size(shape)
    assert not Candidate((whole,) * 3, hidden=32).is_full_size(shape)
    assert not Candidate((whole, whole)).is_full_size(shape)
    assert Candidate((whole, replace(whole, pattern=Pattern("2:4", 0.5)), whole)).is_sparse
    assert Candidate((whole, replace(whole, ffn_format=Format(4, 32)), whole)).is_quantized


def test_structure_key_ignores_precision_and_pattern_but_no_width() -> None:
    layer = Layer(128, 2)
    base = Candidate((layer,) * 3)
    assert (
        base.structure_key == Candidate((replace(layer, pattern=Pattern("2:4", 0.5)),) * 3, Format(4, 32)).structure_key
    )
    others = [
        Candidate((layer,) * 2),
        Candidate((replace(layer, ffn=64),) * 3),
        Candidate((replace(layer, kv_groups=1),) * 3),
        Candidate((layer,) * 3, hidden=32),
    ]
    assert len({base.structure_key, *(c.structure_key for c in others)}) == 5


def test_mixed_layers_and_foreign_candidates_have_no_parameters() -> None:
    space = Space.of(SHAPES["tiny"], KERNELS)
    with pytest.raises(ValueError, match="layer-uniform"):
        space.encode(Candidate((Layer(128, 2), Layer(96, 2), Layer(128, 2))))
    with pytest.raises(ValueError):
        space.encode(Candidate((Layer(128, 2, Format(8, 32, "fp32"), FP32),) * 3))
    with pytest.raises(ValueError):
        space.encode(Candidate((Layer(112, 2),) * 3))


def test_mild_spaces_cut_less() -> None:
    for shape in SHAPES.values():
        deep, mild = Space.of(shape, KERNELS), Space.of(shape, KERNELS, mild=True)
        assert mild.min_depth >= 0.75 * shape.layers
        assert mild.min_kv_groups >= 0.75 * shape.kv_heads
        wide, wider = (Space.of(shape, KERNELS, mild, hidden=True).hidden_widths for mild in (False, True))
        assert wide[0] <= wider[0] and wider[0] >= 0.5 * shape.hidden
        assert deep.hidden_widths == mild.hidden_widths == (shape.hidden,)
        assert set(mild.ffn_widths) <= {w for w in range(shape.ffn + 1) if w >= deep.min_ffn}
        assert mild.smallest() >= deep.smallest()


@given(st.integers(1, 800).map(lambda n: 16 * n), st.booleans())
def test_ffn_widths_are_few_ascending_and_end_with_the_teachers(ffn: int, mild: bool) -> None:
    space = Space.of(Shape(4, 64, ffn, 4, 2, 16, 100), KERNELS, mild)
    widths = space.ffn_widths
    assert list(widths) == sorted(set(widths))
    assert widths[-1] == ffn
    assert len(widths) <= 12
    assert all(w % (64 if ffn >= 256 else 32) == 0 for w in widths[:-1])
    assert widths[0] >= min(ffn, 32)


def test_the_default_space_holds_what_the_design_promises() -> None:
    """Depth to a third, widths to a quarter, three precisions for each of four matrices, twelve patterns or more."""
    space = Space.of(EMBEDDED, KERNELS)
    assert space.smallest() == (2, 192, 1)
    assert space.bits == (4, 8, 32)
    ranges: Mapping[str, Any] = space.distributions()
    assert ranges["pattern"][1] == ("none", "2:4", "unstructured", "threshold", "block")
    assert "hidden" not in ranges
    assert ranges["score"][1] == ("magnitude", "wanda", "sparsegpt")
    assert ranges["quantizer"][1] == ("rtn", "gptq")
    assert len(RATIOS) == ranges["ratio"][1][1] + 1
    assert space.size() > 100_000
