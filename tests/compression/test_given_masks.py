"""Masks from and for torch.nn.utils.prune, and zeros of every pattern from the weights through recovery into what ships."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from paretune.common.errors import UsageError
from paretune.compression.distill import RecoveryRecipe, recover
from paretune.compression.export.artifact import compressed_bytes
from paretune.compression.export.graph import build_model
from paretune.compression.network.student import ATTENTION, FFN, Network
from paretune.compression.prune import (
    Importance,
    NothingChanged,
    mask_for,
    masks_of_student,
    put_masks,
    slice_weights,
    sort_by_importance,
    take_masks,
)
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.prediction.latency_fit import features
from paretune.search.evaluators.decoder import DecoderEvaluator
from paretune.search.prepare.prepare import prepare
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.spec import Spec
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.recover import Recover
from paretune.spaces import Candidate, Format, Layer, Pattern, Space
from paretune.teachers.checkpoint.pruned import zero_masks
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.text.tokens import TokenSplit
from support.plans import empty_plan

Weights = dict[str, torch.Tensor]
INT8, INT4 = Format(8, 32, "int8"), Format(4, 32, "int8")
GIVEN = Pattern("given")


def small_module(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


@given(st.integers(0, 50), st.floats(0.1, 0.9))
def test_masks_go_out_to_torch_and_come_back(seed: int, amount: float) -> None:
    module = small_module(seed)
    dense = {name: value.detach().clone() for name, value in module.named_parameters()}
    prune.l1_unstructured(module[0], "weight", amount)
    prune.random_unstructured(module[0], "bias", 1)
    prune.ln_structured(module[2], "weight", 0.5, 2, 0)
    x = torch.randn(5, 12)
    pruned = module(x)
    weights, masks = take_masks(module)
    assert masks.keys() == {"0.weight", "0.bias", "2.weight"}
    assert int((~masks["0.weight"]).sum()) == round(amount * 96) and int((~masks["2.weight"]).sum()) == 16
    assert weights.keys() == dense.keys()
    for name, value in weights.items():
        assert torch.equal(value, dense[name] * masks.get(name, torch.ones(())))
    other = small_module(seed)
    assert not torch.equal(other(x), pruned), "control: it is the masks that make the difference"
    put_masks(other, masks)
    assert torch.equal(other(x), pruned)
    assert {n for n, _ in other.named_buffers()} == {"0.weight_mask", "0.bias_mask", "2.weight_mask"}
    again = take_masks(other)[1]
    assert again.keys() == masks.keys() and all(torch.equal(again[n], masks[n]) for n in masks)
    for name in ("weight", "bias"):
        prune.remove(other[0], name)
    assert torch.equal(other(x), pruned), "torch's own removal agrees"


def test_a_second_mask_keeps_the_zeros_of_both_and_our_own_masks_fit() -> None:
    module = small_module()
    ours = mask_for(module.get_parameter("0.weight"), Pattern("2:4", 0.5), None)
    put_masks(module, {"0.weight": ours})
    assert torch.equal(take_masks(module)[1]["0.weight"], ours)
    first_row = torch.ones(8, 12, dtype=torch.bool)
    first_row[0] = False
    put_masks(module, {"0.weight": first_row})
    assert torch.equal(take_masks(module)[1]["0.weight"], ours & first_row)


def test_masks_that_fit_nothing_are_refused_before_anything_changes() -> None:
    module = small_module()
    good = {"0.weight": torch.zeros(8, 12, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"no 1\.weight"):
        put_masks(module, {**good, "1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"no 5\.weight"):
        put_masks(module, {**good, "5.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"2\.weight must have shape \(4, 8\), but has \(8, 4\)"):
        put_masks(module, {**good, "2.weight": torch.ones(8, 4)})
    assert not list(module.named_buffers())


def test_an_operation_that_changed_nothing_warns(tiny_weights: Weights, tiny_teacher: Teacher) -> None:
    module = small_module()
    with pytest.warns(NothingChanged, match="masked nothing"):
        take_masks(module)
    with pytest.warns(NothingChanged, match="drop no weight"):
        put_masks(module, {"0.weight": torch.ones(8, 12)})
    network, tokens = Network(tiny_teacher.config, tiny_teacher.shape, 3), np.arange(4000) % 288
    name = "model.layers.0.mlp.up_proj.weight"
    whole, recipe = Candidate((Layer(128, 2),) * 3), RecoveryRecipe(tokens=128, context=32, batch=4)

    def recovered(masks: Weights) -> None:
        recover(tiny_weights, tiny_weights, masks, whole, lambda _: network, 3, tokens, recipe)

    with pytest.warns(NothingChanged, match="recovery of the dense student"):
        recovered({name: torch.ones(128, 64, dtype=torch.bool)})
    with pytest.raises(ValueError, match="has no nonsense"):
        recovered({"nonsense": torch.zeros(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingChanged)
        recovered({name: mask_for(tiny_weights[name], Pattern("2:4", 0.5), None)})
        recovered({})
        put_masks(small_module(), {"0.weight": torch.zeros(8, 12)})


def pruned_folder(folder: Path, write_teacher: Callable[..., Path], family: str = "llama", **changes: Any) -> Path:
    """A model whose matrices were pruned with torch and saved as users do, without prune.remove."""
    from transformers import AutoModelForCausalLM

    write_teacher(folder, family=family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            prune.l1_unstructured(module, "weight", 0.4)
            if module.bias is not None:
                prune.random_unstructured(module, "bias", 0.25)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_checkpoint_with_masks_of_torch_loads_with_its_zeros(
    family: str, write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    plain = load_teacher(str(write_teacher(tmp_path / "plain", family=family)))
    folder = pruned_folder(tmp_path / "pruned", write_teacher, family)
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight_mask" in stored and "model.layers.0.mlp.up_proj.weight" not in stored
    teacher = load_teacher(str(folder))
    assert teacher.has_masks and not plain.has_masks
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for name, module in oracle.named_modules():
        for own in ("weight", "bias"):
            if f"{name}.{own}_mask" in stored:
                prune.custom_from_mask(module, own, stored[f"{name}.{own}_mask"])
                prune.remove(module, own)
    ids = torch.randint(0, 288, (2, 24), generator=torch.Generator().manual_seed(0))
    weights = teacher.weights()
    network = Network(teacher.config, teacher.shape, 3)
    with torch.no_grad():
        assert (network(weights, ids) - oracle(ids).logits).abs().max() <= 1e-5
        assert (network(plain.weights(), ids) - oracle(ids).logits).abs().max() > 1e-2, "control: masks forgotten"
    masks = teacher.masks()
    assert len(masks) == 3 * (7 + (3 if family == "qwen2" else 0))
    for name, mask in masks.items():
        assert torch.equal(mask, stored[f"{name}_mask"] != 0) and (weights[name][~mask] == 0).all()


def problem_of(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_teacher(str(folder)).weights()
    assert caught.value.remedy
    return caught.value.problem


def test_broken_masks_are_refused_by_name(write_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "pruned", write_teacher)
    file, name = folder / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    whole = load_file(file)

    def saved(**changes: torch.Tensor | None) -> None:
        tensors = {**whole, **changes}
        save_file({n: t for n, t in tensors.items() if t is not None}, file, {"format": "pt"})

    for half, other in (("_orig", "_mask"), ("_mask", "_orig")):
        saved(**{name + half: None})
        assert f"there is no {name}{half}" in problem_of(folder)
        saved(**{name + other: whole[name + other][:-1].clone()})
        assert f"{name}_orig and {name}_mask must have one shape" in problem_of(folder)
    saved(**{name + "_mask": whole[name + "_mask"] * 0.5})
    assert f"{name}_mask must hold zeros and ones" in problem_of(folder)
    saved(**{name + "_orig": whole[name + "_orig"] * float("nan")})
    assert f"{name}_orig" in problem_of(folder)
    saved(**{"model.layers.0.self_attn.causal_mask": torch.ones(2)})  # no mask of a parameter, and no tensor of a Llama
    assert "no tensor model.layers.0.self_attn.causal_mask" in problem_of(folder)


def test_plain_zeros_are_taken_only_where_there_are_many(tiny_weights: Weights) -> None:
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert zero_masks(tiny_weights) == {}
    some = {**tiny_weights, name: tiny_weights[name] * mask_for(tiny_weights[name], Pattern("2:4", 0.5), None)}
    few = tiny_weights[other].clone()
    few[0, :10] = 0
    found = zero_masks({**some, other: few, "model.norm.weight": torch.zeros(64)})
    assert found.keys() == {name} and torch.equal(found[name], some[name] != 0)


def test_given_masks_are_cut_with_the_student(tiny_teacher: Teacher, tiny_weights: Weights) -> None:
    """Oracle: the zeros of the masked teacher, sorted and sliced as weights."""
    shape, generator = tiny_teacher.shape, torch.Generator().manual_seed(3)
    masks = {
        name: torch.rand(value.shape, generator=generator) > 0.4
        for name, value in tiny_weights.items()
        if "proj" in name or name == "model.embed_tokens.weight"
    }
    order = Importance(
        tuple(tuple(torch.randperm(128, generator=generator).tolist()) for _ in range(3)),
        ((1, 0), (0, 1), (1, 0)),
        (0, 2, 1),
        tuple(torch.randperm(64, generator=generator).tolist()),
    )
    dense, kept = Layer(96, 1), Layer(96, 1, pattern=GIVEN)
    candidate = Candidate((kept, kept), hidden=32)
    found = masks_of_student(masks, tiny_weights, candidate, order, shape)
    masked = {name: (value.abs() + 1) * masks.get(name, torch.ones(())) for name, value in tiny_weights.items()}
    expected = slice_weights(sort_by_importance(masked, order, shape), candidate, order, shape)
    assert found.keys() == {name for name, value in expected.items() if bool((value == 0).any())}
    assert len(found) == 2 * 7 + 1
    for name, mask in found.items():
        assert torch.equal(mask, expected[name] != 0), name
    only_first = masks_of_student(masks, tiny_weights, Candidate((kept, dense), hidden=32), order, shape)
    assert only_first.keys() == {name for name in found if "layers.1." not in name}
    assert masks_of_student(masks, tiny_weights, Candidate((dense, dense)), order, shape) == {}
    whole = Candidate((Layer(128, 2, pattern=GIVEN),) * 3)
    found = masks_of_student(masks, tiny_weights, whole, Importance((), (), ()), shape)
    assert found.keys() == masks.keys() and all(torch.equal(found[n], masks[n]) for n in masks)


def shipped_codes(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Integers of every MatMulNBits, the implied zero point subtracted: node name to [N, K]."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            data = tensors[node.input[1]]
            if facts["bits"] == 4:
                data = np.stack([data & 15, data >> 4], -1)
            found[node.name] = data.reshape(facts["N"], facts["K"]).astype(int) - 2 ** (facts["bits"] - 1)
    return found


NODES = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/o_proj": ("self_attn.o_proj",),
    **{f"mlp/{p}_proj": (f"mlp.{p}_proj",) for p in ("gate", "up", "down")},
}
PATTERNS = [Pattern("2:4", 0.5), Pattern("unstructured", 0.6), Pattern.below(0.8), Pattern("block", 0.5), GIVEN]


def masks_by(pattern: Pattern, weights: Weights) -> Weights:
    """The given mask is somebody's own: a random one."""
    generator, found = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for i in range(3):
        for name in (*ATTENTION, *FFN):
            full = f"model.layers.{i}.{name}.weight"
            random = torch.rand(weights[full].shape, generator=generator) > 0.55
            found[full] = random if pattern == GIVEN else mask_for(weights[full], pattern, None)
    return found


@pytest.mark.parametrize("form", [INT8, INT4], ids=lambda f: f.name)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.kind)
def test_masks_survive_recovery_quantization_and_export(
    pattern: Pattern, form: Format, tiny_teacher: Teacher, tiny_weights: Weights, tiny_tokens: dict[str, TokenSplit]
) -> None:
    """Zeros are counted in the integers that ship; int4 is trained under its rounding, int8 is not."""
    candidate = Candidate((Layer(128, 2, form, form, pattern),) * 3, form, form)
    masks = masks_by(pattern, tiny_weights)
    masked = {name: value * masks.get(name, torch.ones(())) for name, value in tiny_weights.items()}
    network = Network(tiny_teacher.config, tiny_teacher.shape, 3)
    recipe = RecoveryRecipe(tokens=640, context=32, batch=4, muon_lr=0.02)

    def shipped(under: Weights) -> dict[str, np.ndarray]:
        trained, facts = recover(
            tiny_weights, masked, under, candidate, lambda _: network, 3, tiny_tokens["train"].ids, recipe
        )
        assert facts["qat"] == float(form.bits == 4)
        assert not torch.equal(
            trained["model.layers.1.mlp.up_proj.weight"], masked["model.layers.1.mlp.up_proj.weight"]
        )
        return shipped_codes(build_model(trained, candidate, tiny_teacher.config, tiny_teacher.shape))

    found, unmasked = shipped(masks), shipped({})
    for i in range(3):
        for node, names in NODES.items():
            mask = torch.cat([masks[f"model.layers.{i}.{name}.weight"] for name in names]).numpy()
            codes, control = (x[f"/model/layers.{i}/{node}"] for x in (found, unmasked))
            assert codes.shape == mask.shape and (~mask).sum() >= 0.3 * mask.size
            assert (codes[~mask] == 0).all(), "every masked weight ships as code 0"
            assert (codes[mask] != 0).mean() > 0.75, "and what stays does not"
            if form.bits == 8:
                assert (control[~mask] != 0).mean() > 0.2, "control: without the mask the zeros fill in"
    if pattern.kind == "2:4":
        for name, codes in found.items():
            fours = (codes.reshape(len(codes), -1, 4) == 0).sum(-1)
            assert (fours >= 2).all() == name.startswith("/model/layers")


@pytest.mark.parametrize("form", [Format(), INT8, INT4], ids=lambda f: f.name)
def test_what_no_kernel_exploits_gains_bytes_and_no_speed(
    form: Format, tiny_teacher: Teacher, tiny_weights: Weights
) -> None:
    """The fit credits no zero; the compressed size is measured. Structural cuts shrink the file itself."""
    shape, config = tiny_teacher.shape, tiny_teacher.config

    def facts(candidate: Candidate, weights: Weights) -> tuple[list[float], int, int]:
        sizes = compressed_bytes(weights, candidate, config, shape)
        return features(candidate, shape).tolist(), sizes.bytes, sizes.compressed_bytes

    dense = Candidate((Layer(128, 2, form, form),) * 3, form, form)
    terms, plain, packed = facts(dense, tiny_weights)
    for pattern in PATTERNS:
        masks = masks_by(pattern, tiny_weights)
        masked = {name: value * masks.get(name, torch.ones(())) for name, value in tiny_weights.items()}
        found = facts(Candidate((Layer(128, 2, form, form, pattern),) * 3, form, form), masked)
        assert found[0] == terms, "no term of the latency fit sees a zero"
        assert found[1] == plain, "the file itself is as large"
        assert found[2] < 0.97 * packed, f"{pattern.name}: {found[2]} of {packed} compressed bytes"
    order = Importance((tuple(range(128)),) * 3, ((0, 1),) * 3, (0, 2, 1))
    layer = Layer(128, 2, form, form)
    for cut in (
        Candidate((layer,) * 2, form, form),
        Candidate((Layer(64, 2, form, form),) * 3, form, form),
        Candidate((Layer(128, 1, form, form),) * 3, form, form),
        Candidate((layer,) * 3, form, form, 32),
    ):
        found = facts(cut, slice_weights(tiny_weights, cut, order, shape))
        assert found[1] < plain and found[2] < packed
        assert sum(found[0]) < sum(terms) and all(a <= b for a, b in zip(found[0], terms, strict=True))


@pytest.fixture(scope="module")
def evaluator(
    tmp_path_factory: pytest.TempPathFactory, write_teacher: Callable[..., Path], tiny_text: Path
) -> DecoderEvaluator:
    folder = pruned_folder(tmp_path_factory.mktemp("teacher") / "pruned", write_teacher)
    home = tmp_path_factory.mktemp("home")
    spec = Spec.model_validate(
        {"teacher": str(folder), "data": str(tiny_text), "budget": "300s", "search_tokens": 4000}
    )
    teacher, profile = load_teacher(spec.teacher), detected_profile()
    space = Space.of(teacher.shape, profile.weight_formats, given=True)
    plan = empty_plan(space, spec)
    create_study(Ready(spec, teacher, profile, space, plan), home, "s", "paretune search").close()
    return DecoderEvaluator(home / "studies" / "s", home)


def test_a_pruned_checkpoint_is_searched_with_its_masks(evaluator: DecoderEvaluator) -> None:
    """A candidate that keeps them recovers under them; a dense one starts from the same weights."""
    space = evaluator.space
    assert space.space.given and "given" in space.space.distributions()["pattern"][1]
    layer = Layer(128, 2, INT8, INT8)
    dense = Candidate((layer,) * 3, INT8, INT8)
    kept = Candidate((Layer(128, 2, INT8, INT8, GIVEN),) * 3, INT8, INT8)
    assert space.space.decode(space.space.encode(kept.canonical(space.teacher.shape))).layers[0].pattern == GIVEN
    weights, masks = space.sparsify(kept, space.dense_weights(kept))
    assert masks.keys() == space.teacher_masks.keys() and len(masks) == 21
    assert all(torch.equal(weights[name], space.teacher_weights[name]) for name in weights), (
        "the zeros are there already"
    )
    first, second = (evaluator.run(Explore(c)).found for c in (dense, kept))
    assert first.scores == second.scores and second.facts()["sparsity"] == pytest.approx(0.4, abs=0.01)
    outcome = evaluator.run(Recover(kept, tokens=2048, seconds_left=60.0))
    assert outcome.status == "complete", outcome.reason
    stored = load_file(outcome.found.recovered.file)
    assert all((stored[name][~mask] == 0).all() for name, mask in masks.items())


def test_a_pattern_that_drops_nothing_warns_and_is_recorded(evaluator: DecoderEvaluator) -> None:
    idle = Candidate((Layer(128, 2, pattern=Pattern("unstructured", 1e-5)),) * 3)
    with pytest.warns(NothingChanged, match="drops no weight: 3 layers"):
        outcome = evaluator.run(Explore(idle))
    assert outcome.found.facts() == {"sparsity": 0.0, "idle_masks": 1.0}
    busy = Candidate((Layer(128, 2, pattern=Pattern("2:4", 0.5)),) * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingChanged)
        assert "idle_masks" not in evaluator.run(Explore(busy)).found.facts()


def test_keeping_zeros_of_a_teacher_that_has_none_is_refused(
    tiny_teacher_dir: Path, tiny_text: Path, write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"data": str(tiny_text), "budget": "300s", "keep_zeros": True}
    with pytest.raises(UsageError, match="keep_zeros needs a teacher"):
        prepare(Spec.model_validate({"teacher": str(tiny_teacher_dir), **settings}), tmp_path / "home")
    folder = write_teacher(tmp_path / "zeros")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] * mask_for(tensors[name], Pattern("unstructured", 0.5), None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ready = prepare(Spec.model_validate({"teacher": str(folder), **settings}), tmp_path / "home")
    assert isinstance(ready.space, Space) and isinstance(ready.teacher, Teacher)
    assert ready.space.given and ready.teacher.masks(zeros=True).keys() == {name}
