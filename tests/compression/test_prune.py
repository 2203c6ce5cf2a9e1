"""Masks and structural cuts against slow loops, and sorting that must not change what the model computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.compression.network.inputs import READERS
from paretune.compression.network.student import Network
from paretune.compression.prune import (
    Importance,
    LayerStatistics,
    importance,
    layer_statistics,
    mask_for,
    slice_weights,
    sort_by_importance,
)
from paretune.spaces import Candidate, Layer, Pattern, Shape
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.text.tokens import TokenSplit


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def norms(k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(k, generator=torch.Generator().manual_seed(seed + 1)) * 5 + 0.01


def slow_mask(weight: torch.Tensor, pattern: Pattern, norm: torch.Tensor) -> list[list[bool]]:
    """Plain Python: what stays, entry by entry."""
    n, k = weight.shape
    size = [[1.0 if pattern.score == "activation" else abs(float(weight[i, j])) for j in range(k)] for i in range(n)]
    score = [
        [size[i][j] * (1.0 if pattern.score == "magnitude" else float(norm[j])) for j in range(k)] for i in range(n)
    ]
    kept = [[True] * k for _ in range(n)]
    if pattern.kind == "block":
        width = 32 if k % 32 == 0 else 16
        units = list(itertools.product(range(n), range(0, k, width)))
        energy = {(i, b): sum(v * v for v in score[i][b : b + width]) for i, b in units}
        for i, b in sorted(units, key=lambda at: energy[at])[: round(pattern.ratio * len(units))]:
            kept[i][b : b + width] = [False] * width
    elif pattern.kind == "2:4":
        for i, block in itertools.product(range(n), range(0, k, 4)):
            for j in sorted(range(block, block + 4), key=lambda j: score[i][j])[:2]:
                kept[i][j] = False
    elif pattern.kind == "threshold":
        limit = pattern.threshold * math.sqrt(sum(v * v for row in score for v in row) / (n * k))
        kept = [[v >= limit for v in row] for row in score]
    elif pattern.score != "magnitude":
        for i in range(n):
            for j in sorted(range(k), key=lambda j: score[i][j])[: round(pattern.ratio * k)]:
                kept[i][j] = False
    else:
        for i, j in sorted(itertools.product(range(n), range(k)), key=lambda at: score[at[0]][at[1]])[
            : round(pattern.ratio * n * k)
        ]:
            kept[i][j] = False
    return kept


PATTERNS = [
    Pattern("2:4", 0.5, "magnitude"),
    Pattern("2:4", 0.5, "wanda"),
    Pattern("2:4", 0.5, "activation"),
    *(Pattern("unstructured", r, s) for r in (0.3, 0.5, 0.7) for s in ("magnitude", "wanda", "activation")),
    *(Pattern("threshold", r, s) for r in (0.3, 0.7) for s in ("magnitude", "wanda")),
    Pattern.below(1.45, "activation"),
]
BLOCKS = [Pattern("block", r, s) for r in (0.3, 0.5, 0.7) for s in ("magnitude", "wanda")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("k", [16, 36])
def test_masks_are_those_of_the_slow_loop(pattern: Pattern, k: int) -> None:
    weight, norm = random_matrix(9, k), norms(k)
    assert mask_for(weight, pattern, norm).tolist() == slow_mask(weight, pattern, norm)


@pytest.mark.parametrize("pattern", BLOCKS, ids=lambda p: p.name)
@pytest.mark.parametrize("k", [32, 96, 48])
def test_block_masks_are_those_of_the_slow_loop(pattern: Pattern, k: int) -> None:
    """48 is no multiple of 32, so its blocks are repaired to 16, as quantization groups are."""
    weight, norm = random_matrix(9, k), norms(k)
    assert mask_for(weight, pattern, norm).tolist() == slow_mask(weight, pattern, norm)


@given(st.integers(1, 8), st.integers(1, 6), st.sampled_from(BLOCKS), st.integers(0, 99))
def test_blocks_stay_or_go_whole_and_hit_the_ratio_even_with_ties(
    n: int, blocks: int, pattern: Pattern, seed: int
) -> None:
    weight = random_matrix(n, 32 * blocks, seed).round()
    kept = mask_for(weight, pattern, norms(32 * blocks, seed)).view(n, blocks, 32)
    assert torch.equal(kept.all(-1), kept.any(-1))
    assert int((~kept.all(-1)).sum()) == round(pattern.ratio * n * blocks)


@pytest.mark.parametrize("kind", ["2:4", "unstructured", "threshold"])
def test_the_activation_norm_removes_whole_input_features(kind: Any) -> None:
    """So that the engine's matrix loses columns, as a structural cut of its inputs would."""
    mask = mask_for(random_matrix(9, 36), Pattern(kind, 0.5, "activation"), norms(36))
    assert torch.equal(mask.all(0), mask.any(0))
    assert 0 < int(mask.all(0).sum()) < 36
    other = mask_for(random_matrix(9, 36), Pattern(kind, 0.5, "wanda"), norms(36))
    assert not torch.equal(other.all(0), other.any(0)), "control: Wanda looks at the weights too"


@given(st.floats(0.05, 3.0), st.sampled_from(["magnitude", "wanda", "activation"]), st.integers(0, 99))
def test_one_threshold_takes_what_lies_below_it_and_more_from_heavier_tails(
    threshold: float, score: Any, seed: int
) -> None:
    pattern = Pattern.below(threshold, score)
    assert pattern.threshold == pytest.approx(threshold, rel=1e-6)
    assert 0 < pattern.ratio < 1
    weight, norm = random_matrix(40, 64, seed), norms(64, seed)
    kept = mask_for(weight, pattern, norm)
    assert torch.equal(kept, mask_for(weight * 7, pattern, norm * 3)), "relative to the root mean square"
    assert kept.all() or not mask_for(weight, Pattern.below(threshold * 1.5, score), norm).all()
    if score == "magnitude":  # 2,560 normal entries: four standard deviations of the share are below 0.04
        assert float((~kept).float().mean()) == pytest.approx(pattern.ratio, abs=0.04)
        heavy = float((~mask_for(weight**3, pattern, norm)).float().mean())
        assert heavy > float((~kept).float().mean()) or threshold > 1.5


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_can_drop_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="positive multiple"):
        Pattern.below(threshold)


def test_a_given_mask_is_where_the_weight_is_not_zero() -> None:
    weight = random_matrix(9, 36) * (random_matrix(9, 36, 1) > 0)
    assert torch.equal(mask_for(weight, Pattern("given"), None), weight != 0)


def test_the_scores_and_scopes_really_differ() -> None:
    """Negative control of the oracle comparison: a mask by the wrong score or over the wrong scope is another mask."""
    weight, norm = random_matrix(9, 36), norms(36)
    found = [mask_for(weight, pattern, norm) for pattern in PATTERNS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    per_row = [sum(not kept for kept in row) for row in mask_for(weight, Pattern("unstructured", 0.5), None).tolist()]
    assert len(set(per_row)) > 1, "magnitude must compare over the whole matrix"


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(["magnitude", "wanda"]), st.integers(0, 999))
def test_two_of_four_leaves_exactly_two_in_every_four_even_with_ties(
    n: int, blocks: int, score: str, seed: int
) -> None:
    weight = random_matrix(n, 4 * blocks, seed).mul(2).round()  # many ties and zeros
    mask = mask_for(weight, Pattern("2:4", 0.5, score), norms(4 * blocks, seed))  # type: ignore[arg-type]
    assert (mask.view(n, blocks, 4).sum(-1) == 2).all()


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from([0.3, 0.4, 0.5, 0.6, 0.7]),
    st.sampled_from(["magnitude", "wanda"]),
)
def test_a_ratio_drops_exactly_that_many_even_with_ties(n: int, k: int, ratio: float, score: str) -> None:
    mask = mask_for(torch.ones(n, k), Pattern("unstructured", ratio, score), torch.ones(k))  # type: ignore[arg-type]
    if score == "wanda":
        assert ((~mask).sum(1) == round(ratio * k)).all()
    else:
        assert int((~mask).sum()) == round(ratio * n * k)


@pytest.mark.parametrize("pattern", [Pattern(), *PATTERNS, *BLOCKS], ids=lambda p: p.name)
def test_masks_of_views_are_those_of_their_copies(pattern: Pattern) -> None:
    whole = random_matrix(24, 64)
    for view in (whole[:, :32], whole[:16, :32], whole[:16], whole.t()[:, :20]):
        if pattern.kind == "block" and view.shape[1] % 16:
            continue
        norm = norms(view.shape[1])
        assert torch.equal(
            mask_for(view, pattern, norm), mask_for(view.clone(memory_format=torch.contiguous_format), pattern, norm)
        )


def test_dense_keeps_everything_and_impossible_masks_are_refused() -> None:
    assert mask_for(random_matrix(3, 5), Pattern(), None).all()
    with pytest.raises(ValueError, match="K=6"):
        mask_for(random_matrix(2, 6), Pattern("2:4", 0.5), None)
    with pytest.raises(ValueError, match="K=40"):
        mask_for(random_matrix(2, 40), Pattern("block", 0.5), None)
    with pytest.raises(ValueError, match="sparsegpt"):
        mask_for(random_matrix(2, 8), Pattern("2:4", 0.5, "sparsegpt"), norms(8))
    with pytest.raises(ValueError, match="input norms"):
        mask_for(random_matrix(2, 8), Pattern("2:4", 0.5, "wanda"), None)
    with pytest.raises(ValueError, match="activation score needs the input norms"):
        mask_for(random_matrix(2, 8), Pattern("threshold", 0.5, "activation"), None)


@pytest.fixture(scope="module")
def ids(tiny_tokens: dict[str, TokenSplit]) -> torch.Tensor:
    return torch.from_numpy(tiny_tokens["calibration"].windows(32).ids[:8])


@pytest.fixture(scope="module")
def network(tiny_teacher: Teacher) -> Network:
    return Network(tiny_teacher.config, tiny_teacher.shape, tiny_teacher.shape.layers)


def test_statistics_are_those_of_transformers_own_model(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], network: Network, ids: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_teacher.folder)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.__setitem__(name, inputs[0]))
    model.model.norm.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("last", inputs[0]))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    stream = [*hidden[:-1], seen["last"]]  # what transformers calls the last hidden state is normalized
    found = layer_statistics(network, tiny_weights, ids)
    assert len(found) == 3
    for i, layer in enumerate(found):
        assert set(layer.input_norms) == {name for names in READERS.values() for name in names}
        for name in layer.input_norms:
            x = seen[f"model.layers.{i}.{name}"].flatten(0, 1)
            slow = torch.tensor([math.sqrt(sum(float(v) ** 2 for v in x[:, j])) for j in (0, x.shape[1] - 1)])
            assert torch.allclose(layer.input_norms[name][[0, -1]], slow, rtol=1e-4)
            assert torch.allclose(layer.input_norms[name], x.norm(dim=0), rtol=1e-4)
        cosine = (stream[i] * stream[i + 1]).sum(-1) / stream[i].norm(dim=-1) / stream[i + 1].norm(dim=-1)
        assert layer.influence == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    assert found[2].influence != pytest.approx(
        1 - float(torch.nn.functional.cosine_similarity(hidden[2], hidden[3], dim=-1).mean()), abs=1e-3
    ), "control: the normalized stream is another"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.module.modules())


def statistics_of(shape: Shape, seed: int) -> list[LayerStatistics]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LayerStatistics(
            {
                "mlp.down_proj": torch.rand(shape.ffn, generator=generator),
                "self_attn.o_proj": torch.rand(shape.heads * shape.head_dim, generator=generator),
            },
            float(torch.rand(1, generator=generator)),
        )
        for _ in range(shape.layers)
    ]


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
def test_importance_orders_by_activation_and_keeps_both_ends(
    layers: int, kv_heads: int, per_group: int, seed: int
) -> None:
    shape = Shape(layers, 64, 48, kv_heads * per_group, kv_heads, 16, 100)
    statistics = statistics_of(shape, seed)
    order = importance(statistics, shape)
    for found, ffn, groups in zip(statistics, order.ffn, order.groups, strict=True):
        activation = found.input_norms["mlp.down_proj"].tolist()
        assert sorted(ffn) == list(range(48))
        assert [activation[j] for j in ffn] == sorted(activation, reverse=True)
        heads = found.input_norms["self_attn.o_proj"].tolist()
        size = per_group * 16
        energy = [math.sqrt(sum(v * v for v in heads[g * size : (g + 1) * size])) for g in range(kv_heads)]
        assert sorted(groups) == list(range(kv_heads))
        assert all(energy[a] >= energy[b] - 1e-5 for a, b in itertools.pairwise(groups))
    inner = order.layers[min(2, layers) :]
    assert sorted(order.layers) == list(range(layers))
    assert [statistics[i].influence for i in inner] == sorted((statistics[i].influence for i in inner), reverse=True)
    previous: set[int] = set()
    for depth in range(1, layers + 1):
        kept = order.kept_layers(depth)
        assert kept == sorted(set(kept))
        assert len(kept) == depth
        assert previous < set(kept)
        if depth >= 2:
            assert {0, layers - 1} <= set(kept)
        previous = set(kept)


def shuffled(shape: Shape, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)

    def permutation(n: int) -> tuple[int, ...]:
        return tuple(torch.randperm(n, generator=generator).tolist())

    return Importance(
        tuple(permutation(shape.ffn) for _ in range(shape.layers)),
        tuple(permutation(shape.kv_heads) for _ in range(shape.layers)),
        tuple(range(shape.layers)),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "head_dim": 32},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"family": "qwen2", "num_key_value_heads": 4},
        {"family": "qwen3"},
    ],
    ids=["grouped", "untied, wide heads", "multi-head", "multi-query", "biases", "q/k norms"],
)
def test_sorting_leaves_the_logits_unchanged(
    tmp_path: Path, write_teacher: Callable[..., Path], changes: dict[str, object], ids: torch.Tensor
) -> None:
    teacher = load_teacher(str(write_teacher(tmp_path / "model", **changes)))
    weights, shape = teacher.weights(), teacher.shape
    network = Network(teacher.config, shape, shape.layers)
    with torch.no_grad():
        before = network(weights, ids)
        order = importance(layer_statistics(network, weights, ids), shape)
        for seed in range(3):
            mixed = shuffled(shape, seed) if seed else order
            after = network(sort_by_importance(weights, mixed, shape), ids)
            assert (after - before).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("forgotten", ["mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.k_proj"])
def test_forgetting_one_matrix_in_the_sort_is_seen(
    forgotten: str, tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], network: Network, ids: torch.Tensor
) -> None:
    """Negative control of the test above."""
    order = replace(shuffled(tiny_teacher.shape, 1), groups=((1, 0),) * 3)
    wrong = sort_by_importance(tiny_weights, order, tiny_teacher.shape)
    name = f"model.layers.1.{forgotten}.weight"
    wrong[name] = tiny_weights[name]
    with torch.no_grad():
        assert (network(wrong, ids) - network(tiny_weights, ids)).abs().max() > 1e-2


def test_the_whole_sorted_model_is_its_own_largest_slice(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor]
) -> None:
    shape = tiny_teacher.shape
    order = shuffled(shape, 4)
    ordered = sort_by_importance(tiny_weights, order, shape)
    whole = slice_weights(ordered, Candidate((Layer(shape.ffn, shape.kv_heads),) * shape.layers), order, shape)
    assert whole.keys() == ordered.keys()
    assert all(torch.equal(whole[name], ordered[name]) for name in ordered)


def test_slices_are_nested_views_of_the_kept_layers(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor]
) -> None:
    shape = tiny_teacher.shape
    order = replace(shuffled(shape, 2), layers=(0, 2, 1))
    ordered = sort_by_importance(tiny_weights, order, shape)
    small = slice_weights(ordered, Candidate((Layer(32, 1),) * 2), order, shape)
    large = slice_weights(ordered, Candidate((Layer(96, 2),) * 3), order, shape)
    for new, old in enumerate([0, 2]):
        for name, size in {
            "self_attn.q_proj": (32, 64),
            "self_attn.k_proj": (16, 64),
            "self_attn.v_proj": (16, 64),
            "self_attn.o_proj": (64, 32),
            "mlp.gate_proj": (32, 64),
            "mlp.up_proj": (32, 64),
            "mlp.down_proj": (64, 32),
        }.items():
            inner, outer = small[f"model.layers.{new}.{name}.weight"], large[f"model.layers.{old}.{name}.weight"]
            assert inner.shape == size
            assert torch.equal(inner, outer[: size[0], : size[1]])
            assert inner.data_ptr() == ordered[f"model.layers.{old}.{name}.weight"].data_ptr()
    assert not any(name.startswith("model.layers.2.") for name in small)


def test_the_best_neurons_of_a_slice_are_those_of_the_teacher(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], network: Network, ids: torch.Tensor
) -> None:
    shape = tiny_teacher.shape
    order = importance(layer_statistics(network, tiny_weights, ids), shape)
    found = slice_weights(sort_by_importance(tiny_weights, order, shape), Candidate((Layer(32, 1),) * 3), order, shape)
    for i in range(3):
        best, group = list(order.ffn[i][:32]), order.groups[i][0]
        assert torch.equal(
            found[f"model.layers.{i}.mlp.up_proj.weight"], tiny_weights[f"model.layers.{i}.mlp.up_proj.weight"][best]
        )
        assert torch.equal(
            found[f"model.layers.{i}.self_attn.v_proj.weight"],
            tiny_weights[f"model.layers.{i}.self_attn.v_proj.weight"][group * 16 : (group + 1) * 16],
        )


def test_a_slice_computes_what_zeroing_the_rest_computes(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], network: Network, ids: torch.Tensor
) -> None:
    """Oracle of the cut: dropped neurons and heads with zeroed output columns contribute nothing."""
    shape = tiny_teacher.shape
    order = shuffled(shape, 3)
    ordered = sort_by_importance(tiny_weights, order, shape)
    zeroed = dict(ordered)
    for i in range(3):
        for name, kept in (("mlp.down_proj", 64), ("self_attn.o_proj", 32)):
            value = ordered[f"model.layers.{i}.{name}.weight"].clone()
            value[:, kept:] = 0
            zeroed[f"model.layers.{i}.{name}.weight"] = value
    with torch.no_grad():
        cut = network(slice_weights(ordered, Candidate((Layer(64, 1),) * 3), order, shape), ids)
        assert (cut - network(zeroed, ids)).abs().max() <= 1e-4
        assert (cut - network(ordered, ids)).abs().max() > 1e-1
