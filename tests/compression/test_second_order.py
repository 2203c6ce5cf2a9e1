"""GPTQ and SparseGPT against slow oracles that solve for the best remaining weights anew at every column, and what they gain."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.compression.calibration.calibrated import calibrated_codes, sparsegpt_weights
from paretune.compression.hessian import DAMPING, gram_of, inverse_factor
from paretune.compression.network.inputs import each_input
from paretune.compression.network.student import EMBEDDING, HEAD, Network
from paretune.compression.prune import mask_for, sparsegpt
from paretune.compression.quantize import quantize
from paretune.compression.quantize.gptq import gptq
from paretune.spaces import Candidate, Format, Layer, Pattern
from paretune.spaces.candidate import group_for
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.tokens import TokenSplit

Weights = dict[str, torch.Tensor]


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated_gram(k: int, seed: int = 0, rank: int = 0, samples: int = 0) -> torch.Tensor:
    """Of inputs that mix a few strong directions (a quarter of K unless told) with noise, features of unequal size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rank, samples = rank or k // 4, samples or 4 * k
    x = torch.randn(samples, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    x = (x + 0.3 * rank**0.5 * torch.randn(samples, k, generator=generator)) * torch.rand(k, generator=generator).exp()
    return gram_of(x)


def output_error(weight: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean squared error of the outputs: trace((W - Q) G (W - Q)^T)."""
    d = (weight - changed).double()
    return float((d @ gram.double() * d).sum())


def damped(gram: torch.Tensor) -> np.ndarray:
    h = gram.double().numpy()
    found: np.ndarray = h + DAMPING * h.diagonal().mean() * np.eye(len(h))
    return found


def adapted(row: np.ndarray, settled: list[float], h: np.ndarray) -> np.ndarray:
    """The best values of the columns that are still free, once the first ones are settled: one linear solve, no updates."""
    j = len(settled)
    moved = np.array(settled) - row[:j]
    return row[j:] - np.linalg.solve(h[j:, j:], h[j:, :j] @ moved) if j else row.copy()


def slow_gptq(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int, mask: torch.Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    h, top, codes, scales = damped(gram), 2 ** (bits - 1), [], []
    for row, kept in zip(weight.double().numpy(), mask.tolist(), strict=True):
        row_codes: list[int] = []
        row_scales: list[float] = []
        settled: list[float] = []
        for j in range(len(row)):
            left = adapted(row, settled, h)
            if j % group == 0:
                values = [v if k else 0.0 for v, k in zip(left[:group], kept[j : j + group], strict=True)]
                row_scales.append(max(values, key=abs) / -top or 2.0**-20)
            code = min(top - 1, max(-top, round(left[0] / row_scales[-1]))) if kept[j] else 0
            row_codes.append(code)
            settled.append(code * row_scales[-1])
        codes.append(row_codes)
        scales.append(row_scales)
    return codes, scales


def mask_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.ones_like(weight, dtype=torch.bool) if kind == "none" else mask_for(weight, Pattern(kind, 0.5), None)  # type: ignore[arg-type]


def grams(network: Network, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Gram matrix of every matrix's input by the weight's name; matrices with the same input share one."""
    found: dict[str, torch.Tensor] = {}
    each_input(network, weights, ids, lambda names, x: found.update(dict.fromkeys(names, gram_of(x))))
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("k", "group"), [(32, 16), (96, 32), (160, 32), (256, 256), (160, 0)])
@pytest.mark.parametrize("kind", ["none", "2:4", "block"])
def test_gptq_is_the_slow_oracle(bits: int, k: int, group: int, kind: str) -> None:
    """Codes may differ by one where float32 lands on the other side of a tie (a tie can move what follows, so few may)."""
    weight, gram = random_matrix(3, k, k), correlated_gram(k, k)
    mask = mask_of(weight, kind)
    found = gptq(weight * mask, gram, Format(bits, group), mask)  # type: ignore[arg-type]
    codes, scales = slow_gptq(weight * mask, gram, bits, found.group_size, mask)
    difference = (found.codes.int() - torch.tensor(codes)).abs()
    assert float((difference > 0).float().mean()) <= 0.005
    assert torch.allclose(found.scales.double(), torch.tensor(scales, dtype=torch.float64), rtol=0.02)
    nearest = quantize(weight * mask, Format(bits, group))  # type: ignore[arg-type]
    assert (found.codes != nearest.codes)[mask].float().mean() > 0.05, "control: rounding to nearest is something else"


def test_without_correlation_gptq_rounds_to_nearest() -> None:
    weight = random_matrix(9, 192)
    for gram in (torch.eye(192), torch.diag(torch.rand(192) + 0.1), torch.zeros(192, 192)):
        found, nearest = gptq(weight, gram, Format(4, 64)), quantize(weight, Format(4, 64))
        assert torch.equal(found.codes, nearest.codes)
        assert torch.equal(found.scales, nearest.scales)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("group", [32, 128])
def test_gptq_keeps_the_outputs_better_than_rounding_to_nearest(seed: int, group: int) -> None:
    weight, gram = random_matrix(64, 256, seed), correlated_gram(256, seed)
    form = Format(4, group)
    nearest = output_error(weight, quantize(weight, form).dequantize(), gram)
    assert output_error(weight, gptq(weight, gram, form).dequantize(), gram) <= 0.7 * nearest
    other = correlated_gram(256, seed + 77)
    assert output_error(weight, gptq(weight, other, form).dequantize(), gram) > nearest, "control: the wrong inputs"


@given(
    st.integers(1, 5),
    st.integers(1, 12).map(lambda m: 16 * m),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["none", "2:4", "unstructured", "block"]),
    st.integers(0, 99),
)
def test_gptq_codes_lie_in_range_on_the_repaired_grid_and_masks_survive(
    n: int, k: int, bits: int, group: int, kind: str, seed: int
) -> None:
    weight, gram = random_matrix(n, k, seed), correlated_gram(k, seed, samples=8)
    mask = mask_of(weight, kind)
    before = weight.clone()
    found = gptq(weight * mask, gram, Format(bits, group), mask)  # type: ignore[arg-type]
    top = 2 ** (bits - 1)
    assert found.codes.dtype == torch.int8 and found.codes.shape == (n, k)
    assert found.group_size == group_for(group, k) and found.scales.shape == (n, k // found.group_size)
    assert -top <= int(found.codes.min()) <= int(found.codes.max()) <= top - 1
    assert (found.codes[~mask] == 0).all() and (found.dequantize()[~mask] == 0).all()
    assert torch.isfinite(found.scales).all()
    assert torch.equal(weight, before), "a pure function"


def slow_sparsegpt(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """Costs by inverting the Hessian of what is left, compensation by one solve per column."""
    h, rows = damped(gram), weight.double().numpy()
    n, k = rows.shape
    width = group_for(32, k) if pattern.kind == "block" else 1
    mask, settled = np.ones((n, k), bool), [list[float]() for _ in range(n)]
    for j in range(k):
        left = [adapted(row, done, h) for row, done in zip(rows, settled, strict=True)]
        if j % (4 if pattern.kind == "2:4" else 128) == 0:
            stop = min(k, j + (4 if pattern.kind == "2:4" else 128))
            cost = {}
            for i, unit in itertools.product(range(n), range(j, stop, width)):
                inverse = np.linalg.inv(h[unit:, unit:])[:width, :width]
                w = left[i][unit - j : unit - j + width]
                cost[i, unit] = float(w @ np.linalg.solve(inverse, w))
            if pattern.kind == "2:4":
                gone = [
                    at for i in range(n) for at in sorted((c for c in cost if c[0] == i), key=lambda c: cost[c])[:2]
                ]
            else:
                count = round(pattern.ratio * n * stop / width) - round(pattern.ratio * n * j / width)
                gone = sorted(cost, key=lambda c: cost[c])[:count]
            for i, unit in gone:
                mask[i, unit : unit + width] = False
        for i in range(n):
            settled[i].append(float(left[i][0]) if mask[i, j] else 0.0)
    return mask, np.array(settled)


PATTERNS = [
    Pattern("2:4", 0.5, "sparsegpt"),
    *(Pattern(kind, r, "sparsegpt") for kind in ("unstructured", "block") for r in (0.3, 0.6)),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("k", [48, 160])
def test_sparsegpt_is_the_slow_oracle(pattern: Pattern, k: int) -> None:
    weight, gram = random_matrix(4, k, k), correlated_gram(k, k)
    mask, kept = sparsegpt(weight, gram, pattern)
    slow_mask, slow_kept = slow_sparsegpt(weight, gram, pattern)
    assert torch.equal(mask, torch.from_numpy(slow_mask))
    assert torch.allclose(kept.double(), torch.from_numpy(slow_kept), atol=1e-5)
    assert (kept[~mask] == 0).all()
    assert (kept - weight)[mask].abs().max() > 1e-3, "control: what stays has moved"


@given(st.integers(1, 6), st.integers(1, 10).map(lambda m: 32 * m), st.sampled_from(PATTERNS), st.integers(0, 99))
def test_sparsegpt_hits_the_pattern_exactly(n: int, k: int, pattern: Pattern, seed: int) -> None:
    weight, gram = random_matrix(n, k, seed).mul(30).round(), correlated_gram(k, seed, samples=8)  # ties, singular
    mask, kept = sparsegpt(weight, gram, pattern)
    assert torch.isfinite(kept).all() and (kept[~mask] == 0).all()
    if pattern.kind == "2:4":
        assert (mask.view(n, k // 4, 4).sum(-1) == 2).all()
    elif pattern.kind == "unstructured":
        assert int((~mask).sum()) == round(pattern.ratio * n * k)
    else:
        blocks = mask.view(n, k // 32, 32)
        assert torch.equal(blocks.all(-1), blocks.any(-1))
        assert int((~blocks.all(-1)).sum()) == round(pattern.ratio * n * k / 32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "pattern", [Pattern("2:4", 0.5), Pattern("unstructured", 0.5), Pattern("block", 0.3)], ids=lambda p: p.kind
)
def test_second_order_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern: Pattern, seed: int) -> None:
    weight, gram = random_matrix(64, 256, seed), correlated_gram(256, seed)
    norm = gram.diagonal().sqrt()
    _, kept = sparsegpt(weight, gram, pattern)
    masks = [mask_for(weight, Pattern(pattern.kind, pattern.ratio, s), norm) for s in ("wanda", "magnitude")]
    second, wanda, magnitude = (output_error(weight, w, gram) for w in (kept, *(weight * m for m in masks)))
    assert second < 0.7 * wanda
    assert wanda < magnitude


def test_impossible_inputs_are_refused_and_dense_is_left_alone() -> None:
    weight = random_matrix(2, 8)
    with pytest.raises(ValueError, match="finite"):
        gptq(random_matrix(2, 16), torch.full((16, 16), float("nan")), Format(4, 16))
    with pytest.raises(ValueError, match="K=6"):
        sparsegpt(weight[:, :6], torch.eye(6), Pattern("2:4", 0.5))
    with pytest.raises(ValueError, match="K=8"):
        sparsegpt(weight, torch.eye(8), Pattern("block", 0.5))
    mask, kept = sparsegpt(weight, torch.eye(8), Pattern())
    assert mask.all() and torch.equal(kept, weight)


@pytest.mark.parametrize("samples", [3, 64])
def test_the_factor_is_that_of_the_damped_inverse(samples: int) -> None:
    gram = correlated_gram(32, 5, samples=samples)
    upper = inverse_factor(gram)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose((upper.T @ upper) @ torch.from_numpy(damped(gram)), torch.eye(32).double(), atol=1e-8)


@pytest.fixture(scope="module")
def ids(tiny_tokens: dict[str, TokenSplit]) -> torch.Tensor:
    return torch.from_numpy(tiny_tokens["calibration"].windows(32).ids[:16])


@pytest.fixture(scope="module")
def network(tiny_teacher: Teacher) -> Network:
    return Network(tiny_teacher.config, tiny_teacher.shape, tiny_teacher.shape.layers)


def test_gram_matrices_are_those_of_transformers_own_inputs(
    tiny_teacher: Teacher, tiny_weights: Weights, network: Network, ids: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_teacher.folder)
    seen: Weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _m, inputs, name=name: seen.__setitem__(f"{name}.weight", inputs[0])
            )
    with torch.no_grad():
        model(ids)
    found = grams(network, tiny_weights, ids)
    assert found.keys() == seen.keys()
    for name, gram in found.items():
        x = seen[name].flatten(0, 1).double()
        assert torch.allclose(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(gram.abs().max())), name
    assert not any(module._forward_pre_hooks for module in network.module.modules())


GPTQ = Format(4, 32, "fp32", "gptq")
MIXED = Candidate(
    (
        Layer(128, 2, GPTQ, Format(8, 64, "int8", "gptq"), Pattern("2:4", 0.5, "sparsegpt")),
        Layer(128, 2, Format(4, 32), GPTQ, Pattern("block", 0.5, "magnitude")),
        Layer(128, 2, Format(), GPTQ),
    ),
    GPTQ,
    Format(8, 32),
)


def test_a_student_gets_each_matrix_done_with_its_own_inputs(
    tiny_weights: Weights, network: Network, ids: torch.Tensor
) -> None:
    """Oracle: the pure functions, matrix by matrix, with the Gram matrices from one pass."""
    dense = grams(network, tiny_weights, ids)
    pruned = sparsegpt_weights(network, tiny_weights, MIXED, ids)
    assert {name.split(".")[2] for name in pruned} == {"0"} and len(pruned) == 7
    for name, (mask, kept) in pruned.items():
        expected = sparsegpt(tiny_weights[name], dense[name], MIXED.layers[0].pattern)
        assert torch.equal(mask, expected[0]) and torch.equal(kept, expected[1])
    weights = {**tiny_weights, **{name: kept for name, (_, kept) in pruned.items()}}
    codes, sparse = calibrated_codes(network, weights, MIXED, ids), grams(network, weights, ids)
    wanted = {HEAD} | {n for n in sparse if "layers.0" in n} | {n for n in sparse if "layers" in n and "mlp" in n}
    assert codes.keys() == wanted
    for name, found in codes.items():
        form = Format(8, 64) if "layers.0.mlp" in name else Format(4, 32)
        weight = weights.get(name, weights[EMBEDDING])
        expected_codes = gptq(weight, sparse[name], form, weight != 0 if name in pruned else None)
        assert torch.equal(found.codes, expected_codes.codes), name
        assert torch.equal(found.scales, expected_codes.scales), name
        if name in pruned:
            assert (found.codes[~pruned[name][0]] == 0).all()


def test_nothing_is_run_where_nothing_asks_for_it(tiny_weights: Weights, ids: torch.Tensor) -> None:
    plain = Candidate((Layer(128, 2, Format(4, 32), Format(4, 32), Pattern("2:4", 0.5, "wanda")),) * 3)
    never: Network = None  # type: ignore[assignment]
    assert calibrated_codes(never, tiny_weights, plain, ids) == {}
    assert sparsegpt_weights(never, tiny_weights, plain, ids) == {}
