"""Mixed precision: the sensitivity table against slow passes and measured NLL, the assignment, the space, a whole search."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from paretune.compression.calibration.sensitivity import measure_sensitivity
from paretune.compression.export.graph import build_model
from paretune.compression.network.student import Network, plain_candidate, quantized_weights
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.prediction.latency_fit import features
from paretune.search.budget import Budget
from paretune.search.estimation.calibration import Calibration, Pair
from paretune.search.estimation.state import SearchState
from paretune.search.evaluators.decoder import DecoderEvaluator
from paretune.search.evaluators.simulated import SHAPE as SIMULATED
from paretune.search.evaluators.simulated import SimulatedEvaluator, VirtualClock
from paretune.search.execution.inline import run_inline
from paretune.search.execution.run import run_study
from paretune.search.policy.director import Director
from paretune.search.policy.initial_candidates import textbook_candidates
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.sensitivity_budget import affordable_tokens, expected_seconds
from paretune.search.spec import Spec
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.search.tasks.base import Outcome, Task
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.sensitivity import MeasureSensitivity, SensitivityResult
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape, Space
from paretune.spaces.candidate import FP32
from paretune.spaces.mixed import Sensitivity, mean_bits, mix
from paretune.spaces.precision import PrecisionChoices
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.text.tokens import TokenSplit
from support.decoders import decoder
from support.plans import empty_plan

KERNELS = ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32")
INT4, INT8 = Format(4, 32, "int8"), Format(8, 32, "int8")
SHAPES = {
    "tied": Shape(3, 64, 128, 4, 2, 16, 288),
    "untied": Shape(4, 128, 256, 4, 4, 32, 512, tied=False),
    "odd": Shape(2, 48, 96, 3, 3, 16, 100),
}


def table_of(space: Space, seed: int = 0, order: bool = True) -> Sensitivity:
    """A random table that is as tables are: every bit less quadruples the loss, early layers lose more."""
    source, formats, n = np.random.default_rng(seed), space.mixed_formats, space.shape.layers

    def row() -> tuple[float, ...]:
        worth = float(source.lognormal(0, 1))
        return tuple(
            0.0 if f.bits == 32 else worth * 4.0 ** (4 - f.bits) * (1 + f.group_size / 64) * source.uniform(0.9, 1.1)
            for f in formats
        )

    attention, ffn = [tuple(row() for _ in range(n)) for _ in range(2)]
    layers = (0, *(() if n == 1 else (n - 1,)), *reversed(range(1, n - 1)))
    return Sensitivity(formats, attention, ffn, row(), row(), layers if order else ())


def mixed_space(shape: Shape, kernels: tuple[str, ...] = KERNELS, seed: int = 0, **changes: Any) -> Space:
    space = replace(Space.of(shape, kernels, second_order=False), mixed=True, **changes)
    return replace(space, sensitivity=table_of(space, seed))


def base_params(space: Space, **changes: Any) -> dict[str, Any]:
    return space.encode(space.baselines()[0]) | {"precision_mode": "mixed"} | changes


proposals = st.sampled_from([mixed_space(shape, seed=i) for i, shape in enumerate(SHAPES.values())]).flatmap(
    lambda space: st.tuples(
        st.just(space),
        st.fixed_dictionaries(
            {
                name: st.integers(*bounds) if kind == "int" else st.sampled_from(bounds)
                for name, (kind, bounds) in space.distributions().items()
            }
        ),
    )
)


# the space


def test_seeds_of_a_space_with_residual_widths_can_be_told_to_the_sampler() -> None:
    space = mixed_space(SIMULATED, min_hidden=128)
    seeds = [c for c in textbook_candidates(space) if isinstance(c, Candidate)]
    assert any(c.hidden for c in seeds) and any(len(set(c.layers)) > 1 for c in seeds)
    assert all(space.decode(space.encode(c)) == c for c in seeds)


def test_groups_that_a_narrower_student_repairs_are_counted_as_they_are_stored() -> None:
    """128 does not divide 192, so all its groups of 128 become groups of 64, also those along the 768 of down_proj."""
    space = mixed_space(SIMULATED, min_hidden=128)
    narrow = base_params(space, hidden=len(space.hidden_widths) - 1 - space.hidden_widths.index(192))
    found = [space.decode(narrow | {"effective_bits": i}) for i in range(len(space.effective_bits))]
    used = [mean_bits(c, space.shape, 192) for c in found]
    bought = [(u, level) for c, u, level in zip(found, used, space.effective_bits, strict=True) if c != found[0]]
    assert len(bought) > 5 and all(u <= level for u, level in bought)


def test_formats_that_need_calibration_are_not_mixed() -> None:
    kernels = ("fp32/fp32", "int8/static", "int4/int8")
    choices = PrecisionChoices(names=("fp32", "int8-static", "int4"))
    space = Space.of(SIMULATED, kernels, second_order=False, choices=choices)
    assert space.format("int8").needs_calibration, "else there is nothing to leave out"
    assert {f.name for f in space.mixed_formats} == {"fp32", "int4"}


@given(proposals)
def test_mixed_proposals_are_canonical_executable_and_within_their_bits(case: tuple[Space, dict[str, Any]]) -> None:
    space, params = case
    params = params | {"precision_mode": "mixed"}
    candidate = space.decode(params)
    assert candidate.canonical(space.shape) == candidate
    forms = [candidate.head_format, *(f for x in candidate.layers for f in (x.attention_format, x.ffn_format))]
    assert {f.kernel for f in forms} <= set(space.kernels)
    level = space.effective_bits[params["effective_bits"]]
    cheapest = space.decode(params | {"effective_bits": 0})
    used = mean_bits(candidate, space.shape, space.shape.hidden)
    assert used <= level or candidate == cheapest
    assert Candidate.from_json(candidate.to_json()) == candidate


@given(proposals)
def test_encode_is_the_inverse_of_decode_for_both_modes(case: tuple[Space, dict[str, Any]]) -> None:
    space, params = case
    candidate = space.decode(params)
    encoded = space.encode(candidate)
    assert space.decode(encoded) == candidate
    assert encoded.keys() == space.distributions().keys()


@given(proposals, st.integers(0, 30))
def test_more_bits_never_lose_more(case: tuple[Space, dict[str, Any]], other: int) -> None:
    space, params = case
    assert space.sensitivity is not None
    levels = sorted((params["effective_bits"], other % len(space.effective_bits)))
    losses = [
        summed_loss(space.decode(params | {"precision_mode": "mixed", "effective_bits": i}), space.sensitivity)
        for i in levels
    ]
    assert losses[1] <= losses[0] * (1 + 1e-12)


def summed_loss(candidate: Candidate, table: Sensitivity) -> float:
    """What the table says of a candidate, looked up by bits and group size."""
    column = {(f.bits, f.group_size): j for j, f in enumerate(table.formats)}

    def at(row: tuple[float, ...], form: Format) -> float:
        return row[column[form.bits, form.group_size]]

    kept = table.kept_layers(len(candidate.layers))
    layers = sum(
        at(table.attention[old], x.attention_format) + at(table.ffn[old], x.ffn_format)
        for old, x in zip(kept, candidate.layers, strict=True)
    )
    return layers + at(table.head, candidate.head_format) + at(table.embedding, candidate.embedding_format)


@pytest.mark.parametrize("shape", [Shape(2, 64, 128, 4, 4, 16, 100), Shape(2, 64, 128, 4, 4, 16, 100, tied=False)])
@pytest.mark.parametrize("level", [0, 3, 9, 15])
def test_no_other_assignment_within_the_bits_loses_less(shape: Shape, level: int) -> None:
    """Brute force over every assignment of three formats to two layers, head and embedding."""
    space = mixed_space(shape, ("fp32/fp32", "int8/int8", "int4/int8"))
    table = space.sensitivity
    assert table is not None
    found = space.decode(base_params(space, effective_bits=level))
    target, best = space.effective_bits[level], float("inf")
    for forms in itertools.product([f for f in table.formats if f.bits < 16], repeat=6):
        a, b, c, d, head, embedding = forms
        layers = (Layer(128, 4, a, b), Layer(128, 4, c, d))
        candidate = Candidate(layers, head, replace(embedding, activation="fp32"))
        if mean_bits(candidate, shape, shape.hidden) <= target:
            best = min(best, summed_loss(candidate, table))
    assert summed_loss(found, table) == pytest.approx(best, rel=1e-12)


def test_bits_are_those_of_the_file(tiny_teacher: Teacher) -> None:
    """Codes and scales in the graph; a tied table of one format is there once, of two formats twice."""
    shape, weights = tiny_teacher.shape, tiny_teacher.weights()
    space = mixed_space(shape)
    matrices = shape.parameters - (2 * shape.layers + 1) * shape.hidden
    for level in range(0, len(space.effective_bits), 3):
        candidate = space.decode(base_params(space, effective_bits=level))
        model = build_model(weights, candidate, tiny_teacher.config, shape)
        stored = sum(len(t.raw_data) for t in model.graph.initializer if _is_weight(t))
        assert 8 * stored / matrices == pytest.approx(mean_bits(candidate, shape, shape.hidden), rel=1e-12)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return any(part in tensor.name for part in ("_proj", "lm_head", "embedding")) and tensor.name != "embedding_rows"


def test_equal_computations_are_equal_candidates() -> None:
    """With the most bits everything is int8, which uniform precision has too."""
    space = mixed_space(SHAPES["tied"])
    top = space.decode(base_params(space, effective_bits=len(space.effective_bits) - 1))
    params = space.encode(top)
    assert params["precision_mode"] == "uniform"
    assert {f.bits for x in top.layers for f in (x.attention_format, x.ffn_format)} == {8}
    assert space.decode(params).key == top.key
    other = space.decode(base_params(space, effective_bits=3))
    assert space.decode(base_params(space, effective_bits=3, attention_bits=0, group_size=1)).key == other.key


def test_reduced_students_look_their_layers_up_where_they_came_from() -> None:
    space = mixed_space(Shape(5, 64, 128, 4, 2, 16, 288))
    assert space.sensitivity is not None and space.sensitivity.order == (0, 4, 3, 2, 1)
    assert space.sensitivity.kept_layers(3) == [0, 3, 4]
    forms = space.mixed_formats
    cheap = tuple(0.0 for _ in forms)
    dear = tuple(float(32 - f.bits) for f in forms)
    loud = Sensitivity(forms, (cheap,) * 5, (cheap, dear, cheap, dear, cheap), cheap, cheap, (0, 4, 3, 2, 1))
    layers = replace(space, sensitivity=loud).decode(base_params(space, depth=3, effective_bits=4)).layers
    bits = [x.ffn_format.bits for x in layers]
    assert bits[1] > max(bits[0], bits[2]), "the second kept layer is the teacher's fourth, not its second"


@pytest.mark.parametrize("tied", [True, False])
def test_size_counts_what_brute_force_enumerates(tied: bool) -> None:
    space = replace(Space(Shape(3, 64, 64, 2, 2, 16, 100, tied), KERNELS[1:], 2, 32, 2, second_order=False), mixed=True)
    most = space.size()
    space = replace(space, sensitivity=table_of(space))
    ranges = {
        name: range(bounds[0], bounds[1] + 1) if kind == "int" else bounds
        for name, (kind, bounds) in space.distributions().items()
        if name not in ("pattern", "ratio", "score")
    }
    fixed = {"pattern": "none", "ratio": 0, "score": "magnitude"}
    found = [
        (space.decode(params).key, params["precision_mode"])
        for values in itertools.product(*ranges.values())
        for params in [fixed | dict(zip(ranges, values, strict=True))]
    ]
    keys, uniform_keys = {k for k, _ in found}, {k for k, mode in found if mode == "uniform"}
    uniform = replace(space, mixed=False)
    patterns, rest = divmod(uniform.size(), len(uniform_keys))
    assert rest == 0 and patterns > 20
    assert space.size() == patterns * len(keys)
    assert uniform.size() < space.size() <= most


def test_nothing_is_mixed_without_a_table_or_without_formats_to_mix() -> None:
    space = replace(mixed_space(SHAPES["tied"]), sensitivity=None)
    assert {"precision_mode", "effective_bits"} <= space.distributions().keys()
    with pytest.raises(ValueError, match="measure it first"):
        space.decode({**space.encode(space.baselines()[0]), "precision_mode": "mixed"})
    for kernels in (("fp32/fp32",), ("fp32/fp32", "int8/int8")):
        assert "precision_mode" not in replace(Space.of(SHAPES["tied"], kernels), mixed=True).distributions()
    assert "precision_mode" not in Space.of(SHAPES["tied"], KERNELS).distributions()


@pytest.mark.parametrize(
    "bad", [{"head": (0.1,)}, {"ffn": ()}, {"embedding": (float("nan"),) * 5}, {"head": (-1.0,) * 5}]
)
def test_impossible_tables_are_refused(bad: dict[str, Any]) -> None:
    table = mixed_space(SHAPES["untied"]).sensitivity
    assert table is not None and len(table.formats) == 5
    with pytest.raises(ValueError, match="table"):
        replace(table, **bad)
    assert Sensitivity.from_dict(table.to_dict()) == table


def test_large_teachers_measure_less_text_or_nothing() -> None:
    smol = Shape(30, 576, 1536, 9, 3, 64, 49152)
    assert affordable_tokens(Shape(6, 256, 768, 8, 4, 32, 4096), 5, 540.0, 2) == 2048
    assert 0 < affordable_tokens(smol, 4, 4 * 3600.0, 2) < affordable_tokens(smol, 4, 48 * 3600.0, 2)
    assert affordable_tokens(smol, 4, 540.0, 2) == 0
    assert expected_seconds(smol, 4, 1024, 2) == pytest.approx(2 * expected_seconds(smol, 4, 512, 2))


# what people and other parts see


def test_mixed_candidates_say_how_many_layers_have_what() -> None:
    layers = (Layer(128, 2, INT4, INT8),) * 4 + (Layer(128, 2, Format(8, 64, "int8"), INT8),) * 2
    mixed = Candidate(layers, INT8, Format(8, 128))
    text = mixed.describe()
    assert "6 layers, FFN 128" in text and "attn int4 x4, int8 x2, ffn int8, head int8" in text
    assert "groups of 32/64/128" in text
    assert mixed.stratum == "dense/mixed"
    assert Candidate(layers[:4], INT8).stratum == "dense/int8"
    sparse = tuple(replace(x, pattern=Pattern("2:4", 0.5)) for x in layers)
    assert Candidate(sparse, INT8).stratum == "2:4/mixed"
    assert "attn int4, ffn int8," in Candidate(layers[:4], INT8).describe()


def test_the_latency_fit_adds_up_what_each_layer_has() -> None:
    shape = Shape(6, 256, 768, 8, 4, 32, 4096)
    int4, int8 = (Candidate((Layer(768, 4, f, f),) * 6, INT8, INT8) for f in (INT4, INT8))
    mixed = Candidate(int4.layers[:4] + int8.layers[4:], INT8, INT8)
    expected = (4 * features(int4, shape) + 2 * features(int8, shape)) / 6
    assert features(mixed, shape).tolist() == pytest.approx(expected.tolist())
    assert features(mixed, shape).tolist() != pytest.approx(features(int4, shape).tolist())


def test_the_calibration_sees_the_share_of_four_bit_matrices() -> None:
    shape = Shape(6, 256, 768, 8, 4, 32, 4096)
    whole, none = (Candidate((Layer(768, 4, f, f),) * 6, INT8, INT8) for f in (INT4, INT8))
    half = Candidate(whole.layers[:3] + none.layers[:3], INT8, INT8)
    pairs = [Pair(c, 0.1, v) for c, v in ((whole, 0.06), (none, 0.1), (whole, 0.06), (none, 0.1))]
    fitted = Calibration(shape, pairs)
    low, middle, high = (fitted.estimate(c, 0.1) for c in (whole, half, none))
    assert middle == pytest.approx((low + high) / 2) and low < middle < high


# the table


def networks_of(teacher: Teacher) -> Callable[[int], Network]:
    made: dict[int, Network] = {}
    return lambda depth: made.setdefault(depth, Network(teacher.config, teacher.shape, depth))


def alone(plain: Candidate, group: str, layer: int, form: Format) -> Candidate:
    """`plain` with one matrix group rounded."""
    change: dict[str, Any] = {group: form}
    if group in ("head_format", "embedding_format"):
        return replace(plain, **change)
    layers = [replace(x, **change) if i == layer else x for i, x in enumerate(plain.layers)]
    return replace(plain, layers=tuple(layers))


def entries(shape: Shape) -> list[tuple[str, int]]:
    layers = [(g, i) for i in range(shape.layers) for g in ("attention_format", "ffn_format")]
    return [*layers, ("head_format", 0), ("embedding_format", 0)]


def entry(table: Sensitivity, group: str, layer: int) -> tuple[float, ...]:
    rows = {"attention_format": table.attention, "ffn_format": table.ffn}
    if group in rows:
        return rows[group][layer]
    return table.head if group == "head_format" else table.embedding


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_the_table_is_the_divergence_of_whole_passes(
    family: str, write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    """The oracle runs everything anew, window by window, for every entry; padding does not count."""
    teacher = load_teacher(str(write_teacher(tmp_path / "m", 5, family)))
    shape, weights, networks = teacher.shape, teacher.weights(), networks_of(teacher)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 288, (5, 20)))
    targets = torch.tensor([19, 19, 4, 19, 11])
    formats = (Format(4, 32, "fp32"), Format(4, 64, "int8"), FP32)
    table = measure_sensitivity(networks, weights, shape, formats, ids, targets, batch=2)
    plain, network = plain_candidate(shape, shape.layers), networks(shape.layers)
    with torch.no_grad():
        exact = [network(weights, row[None])[0, :n].log_softmax(-1) for row, n in zip(ids, targets, strict=True)]
    for group, layer in entries(shape):
        assert entry(table, group, layer)[2] == 0.0
        for j in (0, 1):
            candidate, total = alone(plain, group, layer, formats[j]), 0.0
            with torch.no_grad(), network.activations(candidate):
                effective = quantized_weights(weights, candidate)
                for row, n, p in zip(ids, targets, exact, strict=True):
                    q = network(effective, row[None])[0, :n].log_softmax(-1)
                    total += float((p.exp() * (p - q)).sum())
            assert entry(table, group, layer)[j] == pytest.approx(total / int(targets.sum()), rel=2e-2, abs=1e-6)


@pytest.fixture(scope="module")
def trained(
    write_teacher: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    learned_weights: Callable[[str], dict[str, torch.Tensor]],
) -> tuple[Teacher, dict[str, torch.Tensor]]:
    """A teacher of five layers that has learnt the generated text, with outliers of different size in its layers.

    Untrained ones hide what rounding does, and a small trained one without outliers loses so little by int4 that the sign of
    the gradient decides how the NLL of other text moves. The weights are stored, so nothing is left to chance or to the
    processor: between AVX2 and plain SSE code, losses differ by 2e-4 of themselves at most and no rank differs. The nearest
    bound below (0.35 for 0.25, the sum of losses against the joint one) is a thousand times as far.
    """
    folder = write_teacher(tmp_path_factory.mktemp("t") / "m", 3, num_hidden_layers=5, initializer_range=0.06)
    return load_teacher(str(folder)), with_outliers(learned_weights("five"))


def with_outliers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function: every 16th input of down_proj and o_proj is a multiple, what it is multiplied with a fraction."""
    for i, (ffn, attention) in enumerate(zip((1, 8, 3, 20, 5), (14, 1, 8, 3, 25), strict=True)):
        layer = f"model.layers.{i}"
        weights[f"{layer}.mlp.down_proj.weight"][:, ::16] *= ffn
        weights[f"{layer}.mlp.up_proj.weight"][::16] /= ffn
        weights[f"{layer}.self_attn.o_proj.weight"][:, ::16] *= attention
        weights[f"{layer}.self_attn.v_proj.weight"][::16] /= attention
    return weights


TWO: Any = 2
COARSE = (Format(4, 64, "int8"), Format(TWO, 64, "fp32"))


@pytest.fixture(scope="module")
def ranked(
    trained: tuple[Teacher, dict[str, torch.Tensor]], tiny_tokens: dict[str, TokenSplit]
) -> tuple[Sensitivity, dict[tuple[str, int, int], float]]:
    """The table from calibration text, and the measured rise of the NLL on other text, entry by entry."""
    teacher, weights = trained
    shape, networks = teacher.shape, networks_of(teacher)
    text = tiny_tokens["calibration"].windows(64, 1024)
    table = measure_sensitivity(
        networks, weights, shape, COARSE, torch.from_numpy(text.ids), torch.from_numpy(text.targets)
    )
    ids, valid = other_text(tiny_tokens)
    plain, network = plain_candidate(shape, shape.layers), networks(shape.layers)
    measured = {}
    base = nll(network, weights, plain, ids, valid)
    for group, layer in entries(shape):
        for j, form in enumerate(COARSE):
            measured[group, layer, j] = nll(network, weights, alone(plain, group, layer, form), ids, valid) - base
    return table, measured


def other_text(tokens: dict[str, TokenSplit]) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows and their numbers of targets, neither trained nor calibrated on."""
    found = [tokens[split].windows(64, 6000) for split in ("search", "report")]
    ids, targets = (np.concatenate([getattr(w, name) for w in found]) for name in ("ids", "targets"))
    return torch.from_numpy(ids), torch.from_numpy(targets)


@torch.no_grad()
def nll(network: Network, weights: Any, candidate: Candidate, ids: torch.Tensor, targets: torch.Tensor) -> float:
    with network.activations(candidate):
        logits = network(quantized_weights(weights, candidate), ids)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return float(loss[torch.arange(ids.shape[1] - 1)[None] < targets[:, None]].mean())


@pytest.mark.parametrize(("column", "least"), [(0, 0.5), (1, 0.6)], ids=["int4", "int2"])
def test_the_table_ranks_damage_as_the_nll_of_other_text_does(
    ranked: tuple[Sensitivity, dict[tuple[str, int, int], float]],
    trained: tuple[Teacher, dict[str, torch.Tensor]],
    column: int,
    least: float,
) -> None:
    """Kendall's tau over the twelve matrix groups, each really rounded alone. Controls: the sizes of the groups and the rows of
    the table in the wrong order must rank worse than the bound."""
    table, measured = ranked
    rows = entries(trained[0].shape)
    damage = [measured[group, layer, column] for group, layer in rows]
    tau = kendalltau([entry(table, group, layer)[column] for group, layer in rows], damage).statistic
    assert tau >= least, f"tau {tau:.2f}"
    sizes = {"attention_format": 12288, "ffn_format": 24576, "head_format": 18432, "embedding_format": 18432}
    assert kendalltau([sizes[group] for group, _ in rows], damage).statistic < least
    turned = kendalltau([entry(table, g, i)[column] for g, i in reversed(rows)], damage).statistic
    assert turned < least


def test_losses_nearly_add_up(
    ranked: tuple[Sensitivity, dict[tuple[str, int, int], float]],
    trained: tuple[Teacher, dict[str, torch.Tensor]],
    tiny_tokens: dict[str, TokenSplit],
) -> None:
    """What the knapsack takes for granted: all int4 at once against the sum of each alone."""
    teacher, weights = trained
    networks, int4 = networks_of(teacher), COARSE[0]
    text = tiny_tokens["calibration"].windows(64, 1024)
    ids, valid = torch.from_numpy(text.ids), torch.arange(63)[None] < torch.from_numpy(text.targets)[:, None]
    whole = Candidate((Layer(128, 2, int4, int4),) * 5, int4, replace(int4, activation="fp32"))
    with torch.no_grad(), networks(5).activations(whole):
        q = networks(5)(quantized_weights(weights, whole), ids)[:, :-1][valid].log_softmax(-1)
    with torch.no_grad():
        p = networks(5)(weights, ids)[:, :-1][valid].log_softmax(-1)
    joint = float((p.exp() * (p - q)).sum(-1).mean())
    assert summed_loss(whole, ranked[0]) == pytest.approx(joint, rel=0.35)


@pytest.mark.parametrize("level", [2, 4, 6])
def test_the_assignment_beats_its_own_reverse_on_other_text(
    ranked: tuple[Sensitivity, dict[tuple[str, int, int], float]],
    trained: tuple[Teacher, dict[str, torch.Tensor]],
    tiny_tokens: dict[str, TokenSplit],
    level: int,
) -> None:
    """The control spends the same bits by a table turned upside down."""
    teacher, weights = trained
    shape, network, table = teacher.shape, networks_of(teacher)(5), ranked[0]

    def inverse(row: tuple[float, ...]) -> tuple[float, ...]:
        return 0.1 / row[1], 1 / row[1]

    layers: dict[str, Any] = {n: tuple(map(inverse, getattr(table, n))) for n in ("attention", "ffn")}
    upside_down = replace(table, **layers, head=inverse(table.head), embedding=inverse(table.embedding))
    plain, bits = plain_candidate(shape, 5), 2.5 + level / 4
    ids, targets = other_text(tiny_tokens)
    mixed = [mix(plain, one, shape, shape.hidden, bits) for one in (table, upside_down)]
    assert mixed[0] != mixed[1]
    found = [nll(network, weights, candidate, ids, targets) for candidate in mixed]
    assert found[0] < found[1]


# the search


def make_ready(**options: Any) -> Ready:
    spec = Spec.model_validate({"budget": "300s", "fit_points": 30, **options})
    profile = detected_profile()
    space = replace(Space.of(SIMULATED, profile.weight_formats, second_order=False), mixed=spec.mixed_precision)
    plan = empty_plan(space, spec)
    return Ready(spec, load_teacher("stdlib-coder"), profile, space, plan)


class Killed(Exception):
    """A stand-in for SIGKILL."""


def simulate(
    ready: Ready, store: Store, home: Path, stop_after: int = 10**6, evaluator: Any = SimulatedEvaluator
) -> Any:
    """A study on a virtual clock; returns what was done, by kind."""
    clock = VirtualClock()
    simulated, done = evaluator(store.folder, home, clock), Counter[str]()

    def execute(director: Director, *_: Any) -> None:
        director.state.budget.clock = clock
        director.state.budget.__post_init__()

        def evaluate(task: Task) -> Outcome[Any]:
            if sum(done.values()) >= stop_after:
                raise Killed
            done[task.kind] += 1
            outcome: Outcome[Any] = simulated.run(task)
            return outcome

        run_inline(director, evaluate)

    assert run_study(store, ready, home, lambda *_: None, None, execute) == 0
    return done


def is_mixed(candidate: Candidate) -> bool:
    return candidate.layer_precision == "mixed"


def test_a_search_measures_the_table_once_and_proposes_and_confirms_mixed_candidates(tmp_path: Path) -> None:
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    done = simulate(ready, store, tmp_path)
    assert done["sensitivity"] == 1
    assert store.meta("seconds_by_stage")["sensitivity"] == pytest.approx(3.0)
    rows = {r.key: r for r in store.candidates()}
    proposed = [r for r in rows.values() if r.source == "sampler"]
    mixed = [r for r in proposed if r.params["precision_mode"] == "mixed"]
    assert 2 <= len(mixed) < len(proposed)
    layered = {r.key for r in rows.values() if is_mixed(decoder(r.candidate))}
    assert layered and layered <= {k for k, r in rows.items() if r.params["precision_mode"] == "mixed"}
    assert layered & {e.key for e in store.evaluations("confirmed", "complete")}
    names = {p.name for p in load_view(store).rung0 if is_mixed(decoder(p.candidate))}
    assert any("int4+int8" in name for name in names)
    assert any(e.kind == "sensitivity" and "loses most" in e.text for e in store.events())


def test_a_killed_search_goes_on_with_its_table(tmp_path: Path) -> None:
    ready = make_ready(budget="260s")
    whole = create_study(ready, tmp_path / "a", "s", "x")
    simulate(ready, whole, tmp_path / "a")
    broken = create_study(ready, tmp_path / "b", "s", "x")
    for stop_after in (5, 1, 12):
        with pytest.raises(Killed):
            simulate(ready, broken, tmp_path / "b", stop_after)
        broken.close()
        broken = Store.open_study(tmp_path / "b" / "studies" / "s")
    done = simulate(ready, broken, tmp_path / "b")
    assert done["sensitivity"] == 0
    kept = [[(r.key, r.source) for r in store.candidates()] for store in (whole, broken)]
    n = min(map(len, kept))
    assert n > 45 and kept[0][:n] == kept[1][:n]


class TooLarge(SimulatedEvaluator):
    def sensitivity(self, task: MeasureSensitivity) -> Outcome[SensitivityResult]:
        return Outcome("failed", reason="takes too long")


def test_a_table_that_cannot_be_had_costs_only_mixed_precision(tmp_path: Path) -> None:
    ready = make_ready(budget="150s")
    store = create_study(ready, tmp_path, "s", "x")
    assert simulate(ready, store, tmp_path, evaluator=TooLarge)["sensitivity"] == 1
    assert not any(is_mixed(decoder(r.candidate)) for r in store.candidates())
    assert any("no mixed precision is searched: takes too long" in e.text for e in store.events())
    director = Director(SearchState(store, ready.spec, ready.space, Budget(1000.0)))
    assert isinstance(director.state.space, Space) and not director.state.space.has_mixed, "nor is it asked for again"


def test_the_spec_switches_it_off(tmp_path: Path) -> None:
    ready = make_ready(mixed_precision=False, budget="150s")
    store = create_study(ready, tmp_path, "s", "x")
    assert simulate(ready, store, tmp_path)["sensitivity"] == 0
    assert not any(is_mixed(decoder(r.candidate)) for r in store.candidates())


def test_a_lost_worker_is_asked_again_but_not_for_ever(tmp_path: Path) -> None:
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    director = Director(SearchState(store, ready.spec, ready.space, Budget(1000.0)))
    for searched in (True, True, False):
        director.lost(MeasureSensitivity(), "killed", 1.0)
        assert isinstance(director.state.space, Space) and director.state.space.has_mixed is searched
    assert director.state.stop_reason is None


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, tiny_text: Path) -> DecoderEvaluator:
    home = tmp_path_factory.mktemp("home")
    spec = Spec.model_validate(
        {"teacher": str(tiny_teacher_dir), "data": str(tiny_text), "budget": "300s", "search_tokens": 2000}
    )
    teacher, profile = load_teacher(spec.teacher), detected_profile()
    space = replace(Space.of(teacher.shape, profile.weight_formats), mixed=True)
    plan = empty_plan(space, spec)
    create_study(Ready(spec, teacher, profile, space, plan), home, "s", "x").close()
    return DecoderEvaluator(home / "studies" / "s", home)


def test_the_worker_measures_the_table_once_per_teacher_and_text(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = replace(evaluator.space.space, mixed=True)
    task = MeasureSensitivity(space.mixed_formats)
    first = evaluator.run(task).found
    assert first.is_kept is False
    assert evaluator.run(task).found.is_kept is True
    assert len(list((evaluator.space.cache / "sensitivity").glob("*.json"))) == 1
    table = first.table
    assert table.formats == space.mixed_formats and sorted(table.order) == [0, 1, 2]
    assert table.order == evaluator.space.sorted_teacher[1].layers
    assert min(v for row in table.attention for v, f in zip(row, table.formats, strict=True) if f.bits == 4) > 0
    candidate = replace(space, sensitivity=table).decode(base_params(space, effective_bits=4))
    assert is_mixed(candidate)
    scored = evaluator.run(Explore(candidate))
    assert scored.status == "complete" and scored.found.measurements["bytes"].value > 0
    others = task.formats[:1]
    assert evaluator.run(replace(task, formats=others)).found.is_kept is False
    monkeypatch.setattr(evaluator.space, "spec", evaluator.space.spec.model_copy(update={"budget": "0.001s"}))
    too_long = evaluator.run(task)
    assert too_long.status == "failed" and "of the budget" in too_long.reason
