"""Teachers that are plug-ins: finding and checking them, their space, grid, graph and recovery; each with an oracle."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from paretune.common.errors import Infeasible, UsageError
from paretune.compression.calibration.modules import (
    effective_weights,
    groups_of,
    input_norms,
    matrices_of,
    matrix_mask,
    quantize_matrix,
    shape_of_module,
)
from paretune.compression.distill.module_recover import ModuleRecipe, recover_module
from paretune.compression.export.module_graph import ModuleGraph, input_names
from paretune.engines.onnxruntime.decoder import open_session
from paretune.objectives.prediction.latency_fit import LatencyFit, design
from paretune.objectives.quality.module_quality import judge, metric_names_of, module_measurements
from paretune.search.evaluators.plugin import PARITY, parity
from paretune.spaces.candidate import DENSE, FP32, Format, Pattern
from paretune.spaces.kinds import candidate_from_json, params_of
from paretune.spaces.module_candidate import GroupChoice, ModuleCandidate
from paretune.spaces.module_space import ModuleSpace
from paretune.teachers.plugins.check import PluginConformance, check_plugin
from paretune.teachers.plugins.name import is_plugin
from paretune.teachers.plugins.plugin import (
    Batch,
    Forwarding,
    PluginTeacher,
    Quality,
    TeacherPlugin,
    Width,
    find_plugin,
    still,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits"
KERNELS = ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32")


class Net(nn.Module):
    """Every kind of matrix: a Linear on three dimensions, a convolution, a grouped one, a transposed one, a norm."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 64))
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = self.body(x).view(x.shape[0], 4, 8, 8)
        found: torch.Tensor = self.up(torch.relu(self.grouped(torch.relu(self.norm(self.conv(image))))))
        return found


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    assert net.norm.running_mean is not None and net.norm.running_var is not None
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    return net


class Toy(TeacherPlugin):
    """A plug-in of random weights, whose quality is larger where it is better."""

    name = "toy"
    qualities = (
        Quality("closeness", "1", "maximize", lambda out, batch: 10 - (out[0] - batch.target).abs().flatten(1).mean(1)),
    )
    widths = (Width("width", (16, 64)),)

    def load(self) -> nn.Module:
        return make_net()

    def batches(self, split: str) -> list[Batch]:
        generator = torch.Generator().manual_seed(sum(map(ord, split)))
        inputs = [torch.randn(6, 4, 16, generator=generator) for _ in range(3)]
        return [Batch((x,), x.mean()) for x in inputs]

    def slice(self, module: nn.Module, widths: Any) -> nn.Module:
        small, state = Net(widths["width"]), dict(module.state_dict())
        n = widths["width"]
        state["body.0.weight"], state["body.0.bias"] = state["body.0.weight"][:n], state["body.0.bias"][:n]
        state["body.2.weight"] = state["body.2.weight"][:, :n]
        small.load_state_dict(state)
        return small


@pytest.fixture(scope="module")
def digits() -> Iterator[TeacherPlugin]:
    sys.path.insert(0, str(EXAMPLE))
    from paretune_digits import Digits

    yield Digits()
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def toy() -> PluginTeacher:
    return PluginTeacher(Toy())


@pytest.fixture(scope="module")
def graph(toy: PluginTeacher) -> ModuleGraph:
    return ModuleGraph(toy.plugin, toy.module, toy.plugin.batches("calibration")[0])


@pytest.fixture(scope="module")
def space(toy: PluginTeacher) -> ModuleSpace:
    return ModuleSpace.of(shape_of_module(toy.plugin, toy.module), KERNELS)


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def run(model: onnx.ModelProto, batch: Batch, tmp_path: Path) -> tuple[torch.Tensor, ...]:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    session = open_session(str(path), 1)
    feeds = {name: x.numpy() for name, x in zip(input_names(batch), batch.inputs, strict=True)}
    return tuple(torch.from_numpy(x) for x in session.run(None, feeds))


# the grid


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 32])
def test_codes_follow_the_grid_row_by_row(toy: PluginTeacher, bits: Any, group: int) -> None:
    """An obvious implementation in loops: every output channel, and along K every group of a Linear, has its own scale."""
    for name, matrix in matrices_of(toy.module).items():
        weight = parameters(toy.module)[name]
        found = matrix.whole(quantize_matrix(weight, matrix, Format(bits, group)).dequantize(), weight)
        channels = weight.movedim(matrix.axis, 0)
        expected = torch.empty(channels.shape)
        for row in range(len(channels)):
            flat = channels[row].reshape(-1)
            step = 32 if matrix.kind == "linear" and group and len(flat) % 32 == 0 else len(flat)
            if matrix.kind == "linear" and group and len(flat) == 16:
                step = 16
            for start in range(0, len(flat), step):
                part = flat[start : start + step]
                scale = part[part.abs().argmax()] / -(2 ** (bits - 1))
                codes = torch.round(part / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                expected[row].view(-1)[start : start + step] = codes * scale
        torch.testing.assert_close(found, expected.movedim(0, matrix.axis), atol=1e-7, rtol=1e-6)


def test_matrices_are_named_by_parameter_and_grouped_by_module(toy: PluginTeacher) -> None:
    groups = groups_of(matrices_of(toy.module))
    assert groups == {
        "body.0.weight": "body",
        "body.2.weight": "body",
        "conv.weight": "conv",
        "grouped.weight": "grouped",
        "up.weight": "up",
    }
    assert set(groups_of(matrices_of(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))).values()) == {
        "0.0",
        "0.1",
    }
    many = groups_of(matrices_of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(14)))))
    assert list(dict.fromkeys(many.values())) == ["0-2", "3-5", "6-8", "9-11", "12-13"]


def test_a_shared_weight_is_one_matrix() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    assert list(matrices_of(net)) == ["0.weight"]


def test_macs_are_those_of_the_shapes(toy: PluginTeacher, space: ModuleSpace) -> None:
    macs = {group.name: group.macs for group in space.shape.groups}
    assert macs == {
        "body": 6 * 4 * (16 * 64 + 64 * 64),
        "conv": 6 * 8 * 8 * 8 * 4 * 9,
        "grouped": 6 * 6 * 6 * 8 * 4 * 9,
        "up": 6 * 6 * 6 * 8 * 3 * 4,
    }
    assert space.shape.axes[0].shares == ((0.25, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))


# masks


def test_wanda_norms_of_convolutions_against_unfolding(toy: PluginTeacher) -> None:
    """Of an unpadded convolution over large inputs every position of the kernel sees almost the same: compare with a 1 x 1 one."""
    torch.manual_seed(1)

    class Pointwise(Toy):
        def load(self) -> nn.Module:
            return nn.Sequential(nn.Conv2d(6, 4, 1, groups=2))

        def batches(self, split: str) -> list[Batch]:
            return [Batch((torch.arange(2 * 6 * 9.0).view(2, 6, 3, 3),))]

    plugin = Pointwise()
    module = plugin.load()
    norms = input_norms(plugin, module, plugin.batches("calibration"))["0.weight"]
    x = plugin.batches("calibration")[0].inputs[0]
    per_channel = [float(x[:, c].square().sum().sqrt()) for c in range(6)]
    assert norms.shape == (4, 3)
    for row, column in itertools.product(range(4), range(3)):
        assert norms[row, column] == pytest.approx(per_channel[column + (3 if row >= 2 else 0)])


@pytest.mark.parametrize("kind", ["2:4", "unstructured", "block"])
def test_zeros_are_where_the_pattern_says_and_stay_in_the_shipped_integers(
    toy: PluginTeacher, graph: ModuleGraph, kind: Any
) -> None:
    weights, matrices = parameters(toy.module), matrices_of(toy.module)
    fitting = {}
    for name, matrix in matrices.items():
        mask = matrix_mask(weights[name], matrix, Pattern(kind, 0.5), None)
        k = matrix.rows(weights[name]).shape[1]
        assert (mask is None) == ((kind == "2:4" and k % 4 != 0) or (kind == "block" and k % 16 != 0))
        if mask is not None:
            weights[name], fitting[name] = weights[name] * mask, mask
    assert fitting
    model = graph.fill(weights, dict.fromkeys(matrices, Format(4, 32)))
    shipped = {t.name: numpy_helper.to_array(t).astype(np.int8) for t in model.graph.initializer}
    for name, mask in fitting.items():
        rows = matrices[name].rows(mask)
        if kind == "2:4":
            assert (rows.reshape(len(rows), -1, 4).sum(-1) == 2).all()
        place = graph.places[name]
        codes = shipped[f"{place.name}.codes"]
        codes = codes.T if place.transposed else codes
        assert not codes[~mask.numpy()].any()
        assert 0.5 <= (codes == 0).mean() < 0.75


# the graph


@pytest.mark.parametrize(
    "form", [FP32, Format(8, 0), Format(4, 0), Format(4, 32)], ids=lambda f: f"{f.name}-{f.group_size}"
)
def test_parity_of_every_format_and_what_must_fail(
    toy: PluginTeacher, graph: ModuleGraph, form: Format, tmp_path: Path
) -> None:
    batch, weights, matrices = toy.plugin.batches("search")[0], parameters(toy.module), matrices_of(toy.module)
    forms = {} if form.bits == 32 else dict.fromkeys(matrices, form)
    forwarding = Forwarding(toy.plugin, toy.module)
    wanted = forwarding.with_weights(effective_weights(weights, matrices, forms), batch.inputs)
    found = run(graph.fill(weights, forms), batch, tmp_path)
    assert parity(found, wanted) < PARITY / 10
    moved = {**weights, "body.2.weight": weights["body.2.weight"].clone()}
    moved["body.2.weight"][0, 0] += 0.5
    controls = {"one weight moved": run(graph.fill(moved, forms), batch, tmp_path)}
    if forms:
        controls["fake-quant off"] = run(graph.fill(weights, {}), batch, tmp_path)
        coarser = dataclasses.replace(form, bits=4) if form.bits == 8 else dataclasses.replace(form, group_size=0)
        if coarser != form:
            controls["coarser"] = run(graph.fill(weights, dict.fromkeys(matrices, coarser)), batch, tmp_path)
    for outputs in controls.values():
        with pytest.raises(Infeasible, match="must agree"):
            parity(outputs, wanted)


def test_parity_of_every_matrix_alone(toy: PluginTeacher, graph: ModuleGraph, tmp_path: Path) -> None:
    batch, weights, matrices = toy.plugin.batches("search")[0], parameters(toy.module), matrices_of(toy.module)
    forwarding = Forwarding(toy.plugin, toy.module)
    for name in matrices:
        forms = {name: Format(4, 32)}
        wanted = forwarding.with_weights(effective_weights(weights, matrices, forms), batch.inputs)
        parity(run(graph.fill(weights, forms), batch, tmp_path), wanted)
        with pytest.raises(Infeasible):
            parity(run(graph.fill(weights, {}), batch, tmp_path), wanted)


def test_parity_of_a_slice_of_the_example(digits: TeacherPlugin, tmp_path: Path) -> None:
    teacher = PluginTeacher(digits)
    module = still(digits.slice(teacher.module, {"channels": 8, "hidden": 48}))
    batch, weights, matrices = digits.batches("report")[0], parameters(module), matrices_of(module)
    forms = {name: Format(8, 0) if name.startswith("encoder") else Format(4, 32) for name in matrices}
    wanted = Forwarding(digits, module).with_weights(effective_weights(weights, matrices, forms), batch.inputs)
    model = ModuleGraph(digits, module, digits.batches("calibration")[0]).fill(weights, forms)
    assert parity(run(model, batch, tmp_path), wanted) < PARITY / 10
    codes = [t for t in model.graph.initializer if t.name.endswith(".codes")]
    assert len(codes) == len(matrices) and {t.data_type for t in codes} == {
        onnx.TensorProto.INT4,
        onnx.TensorProto.INT8,
    }
    assert str(Path(__file__).parents[2]) not in str(model.SerializeToString())
    onnx.checker.check_model(model)


def test_what_cannot_be_exported_is_infeasible_with_the_op() -> None:
    class Branching(Toy):
        def load(self) -> nn.Module:
            class Branch(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.linear = nn.Linear(16, 4)

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return self.linear(x) if float(x.sum()) > 0 else x

            return Branch()

    plugin = Branching()
    with pytest.raises(Infeasible, match="torch cannot export toy to ONNX"):
        ModuleGraph(plugin, still(plugin.load()), plugin.batches("search")[0])


def test_timing_needs_the_graph_only(toy: PluginTeacher, graph: ModuleGraph, tmp_path: Path) -> None:
    from paretune.engines.process.child import EngineChild

    path = tmp_path / "model.onnx"
    onnx.save(graph.fill(parameters(toy.module), {}), path)
    with EngineChild(1) as child:
        child.ask(do="load", path=str(path), threads=1)
        timed = child.ask(do="time", prompt=128, tokens=5)
        assert len(timed["step_ms"]) == 5 and min(timed["step_ms"]) > 0
        with pytest.raises(Infeasible, match="cannot 'score'"):
            child.ask(do="score")


# the space


def test_candidates_survive_json_and_the_sampler(space: ModuleSpace) -> None:
    generator = random.Random(0)
    for _ in range(200):
        params = {
            name: generator.randint(*bounds) if kind == "int" else generator.choice(bounds)
            for name, (kind, bounds) in space.distributions().items()
        }
        candidate = space.decode(params)
        assert candidate_from_json(candidate.to_json()) == candidate
        assert candidate.canonical(space.shape) == candidate
        assert space.decode(params_of(space, candidate)) == candidate
        assert candidate.describe() and candidate.name


def test_keys_do_not_change(space: ModuleSpace) -> None:
    """Stored studies are found by these keys: a change here makes them unreadable."""
    assert [c.key for c in space.baselines()] == ["f45875e01b73506f", "3d6fcc7059865329", "551dd4f6e6521586"]
    assert json.loads(space.baselines()[0].to_json())["groups"]["up"] == {"format": {}, "pattern": {}}


def test_settings_without_effect_make_equal_candidates(space: ModuleSpace) -> None:
    def candidate(form: Format, pattern: Pattern) -> ModuleCandidate:
        groups = tuple(GroupChoice(g.name, form, pattern) for g in space.shape.groups)
        return ModuleCandidate(groups, (("width", 64),)).canonical(space.shape)

    assert candidate(Format(8, 32, "int8"), DENSE) == candidate(Format(8), DENSE)
    assert candidate(FP32, Pattern("unstructured", 0.0)) == candidate(FP32, DENSE)
    blocks = candidate(Format(4, 32), Pattern("block", 0.5))
    assert [g.pattern.kind for g in blocks.groups] == ["block", "none", "none", "block"]
    assert [g.format.group_size for g in blocks.groups] == [0, 0, 0, 0] or blocks.groups[0].format.group_size == 32
    assert {g.format.group_size for g in blocks.groups[1:]} == {0}


def test_the_fit_finds_a_linear_law(space: ModuleSpace) -> None:
    """From 24 measurements of `3 + 2 per million MACs of conv`, the same for every design point that was left out."""

    def law(candidate: ModuleCandidate) -> float:
        return 3 + 2e-6 * candidate.macs(space.shape)[1] + 1e-6 * candidate.macs(space.shape)[0]

    points = design(space, 24)
    assert all(not c.is_sparse for c in points) and len({c.key for c in points}) == 24
    fit = LatencyFit("forward_ms", "ms", space.shape, [(c, law(c)) for c in points])  # type: ignore[arg-type]
    assert fit.predict(space.seeds()[0]).value == pytest.approx(law(space.seeds()[0]), rel=0.02)


# quality


def test_directions_are_normalised_once(toy: PluginTeacher) -> None:
    """A larger-is-better quality is minimized as its negative; a worse module has a positive loss, a better one a negative."""
    batches = toy.plugin.batches("report")
    forwarding = Forwarding(toy.plugin, toy.module)
    outputs = [forwarding(*b.inputs) for b in batches]
    teacher = judge(toy.plugin, batches, outputs)
    worse = judge(toy.plugin, batches, [(o[0] + 3.0,) for o in outputs])
    found = module_measurements(toy.plugin, worse, teacher.scores, "here")
    own, own_worse = (float(np.mean(j.values["closeness"])) for j in (teacher, worse))
    assert own_worse < own
    assert found["closeness"].value == pytest.approx(own_worse) and found["closeness"].unit == "1"
    assert found["negative_closeness"].value == pytest.approx(-own_worse)
    assert found["relative_loss"].value == pytest.approx((own - own_worse) / abs(own))
    assert found["relative_loss"].low <= found["relative_loss"].value <= found["relative_loss"].high
    assert metric_names_of(toy.plugin).objectives() == ("negative_closeness", "forward_ms", "compressed_bytes")
    assert metric_names_of(toy.plugin).others == ("closeness",)


# recovery


def test_recovery_trains_under_mask_and_rounding_and_ships_what_it_trained(digits: TeacherPlugin) -> None:
    teacher = PluginTeacher(digits)
    matrices, weights, masks = matrices_of(teacher.module), parameters(teacher.module), {}
    for name, matrix in matrices.items():
        mask = matrix_mask(weights[name], matrix, Pattern("unstructured", 0.6), None)
        assert mask is not None
        masks[name], weights[name] = mask, weights[name] * mask
    forms = dict.fromkeys(matrices, Format(4, 0))
    student = Forwarding(digits, teacher.module)
    recovered, facts = recover_module(
        student, student, weights, masks, matrices, forms, digits.batches("train"), ModuleRecipe(32 * 60)
    )
    batches = digits.batches("search")

    def error(values: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            effective = effective_weights(values, matrices, forms)
            return judge(digits, batches, [student.with_weights(effective, b.inputs) for b in batches]).scores.mean_nll

    assert facts["tokens"] == 32 * 60 and facts["qat"] == 1.0
    assert error(recovered) < 0.7 * error(weights)
    assert all(not recovered[name][~mask].any() for name, mask in masks.items())
    model = ModuleGraph(digits, teacher.module, batches[0]).fill(recovered, forms)
    shipped = {t.name: numpy_helper.to_array(t).astype(np.int8) for t in model.graph.initializer if "codes" in t.name}
    assert len(shipped) == len(matrices)
    for codes, mask in zip(shipped.values(), masks.values(), strict=True):
        assert (codes == 0).sum() >= (~mask).sum() >= 0.59 * mask.numel()


# finding


def test_a_plugin_is_found_by_class_and_by_entry_point(digits: TeacherPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    assert is_plugin("plugin:digits") and not is_plugin("stdlib-coder")
    assert find_plugin("plugin:paretune_digits:Digits", EXAMPLE).name == "digits"
    entry = EntryPoint("digits", "paretune_digits:Digits", "paretune.teachers")
    monkeypatch.setattr(
        "paretune.teachers.plugins.plugin.entry_points", lambda **kw: EntryPoints((entry,)).select(**kw)
    )
    assert find_plugin("plugin:digits").name == "digits"
    with pytest.raises(UsageError, match=r"no installed package has a teacher plug-in 'digit'.*found: digits"):
        find_plugin("plugin:digit")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("plugin:no_such_module:Thing", "cannot be imported: ModuleNotFoundError"),
        ("plugin:json:Nothing", "cannot be imported: AttributeError"),
        (
            "plugin:json:JSONDecoder",
            "must be a paretune.teachers.plugins.plugin.TeacherPlugin, but json:JSONDecoder is JSONDecoder",
        ),
        ("plugin:paretune.teachers.plugins.plugin:TeacherPlugin", "cannot be made without arguments: TypeError"),
    ],
)
def test_what_is_no_plugin_is_refused(teacher: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_plugin(teacher)


# conformance


def changed(**attributes: Any) -> TeacherPlugin:
    """A Toy with something wrong."""
    kind: type[Toy] = type("Broken", (Toy,), attributes)
    return kind()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x) + torch.randn(4)
        return found


def seeded(make: Callable[[], nn.Module]) -> Callable[[Any], nn.Module]:
    def load(_self: Any) -> nn.Module:
        torch.manual_seed(0)
        return make()

    return load


def quality(function: Any, direction: Any = "minimize", name: str = "error") -> tuple[Quality, ...]:
    return (Quality(name, "1", direction, function),)


def nan_net(_self: Any) -> nn.Module:
    net = make_net()
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = float("nan")
    return net


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"load": lambda _s: {"weights": 1}}, r"load\(\) .* must give a torch.nn.Module, but gave dict"),
    "load raises": ({"load": lambda _s: Path("/no/such/file").read_text()}, "cannot be run: FileNotFoundError"),
    "quality raises": ({"qualities": quality(lambda o, b: o[7])}, "cannot be run: IndexError"),
    "a decoder's name": ({"qualities": quality(lambda o, b: torch.ones(6), name="nll")}, "a quality needs a name"),
    "NaN weights": ({"load": nan_net}, "weights must be finite, but conv.weight"),
    "other weights each time": ({"load": lambda _s: Net()}, "must give the same weights every time"),
    "no batches": ({"batches": lambda _s, split: []}, "'train' has none"),
    "bare tensors": ({"batches": lambda _s, split: [torch.zeros(2, 4, 16)]}, "wrap the tensors|gave Tensor"),
    "two shapes": (
        {"batches": lambda _s, split: [Batch((torch.zeros(n, 4, 16),), torch.tensor(0.0)) for n in (6, 5)]},
        "same input shapes",
    ),
    "random": ({"load": seeded(Noisy), "widths": ()}, "must be deterministic in evaluation mode"),
    "no tensor": ({"forward": lambda _s, module, x: ("text",)}, "but gave str"),
    "no quality": ({"qualities": ()}, "qualities is empty"),
    "NaN quality": (
        {"qualities": quality(lambda o, b: o[0].flatten(1).sum(1) * float("nan"))},
        "must be finite, but is nan",
    ),
    "zero quality": ({"qualities": quality(lambda o, b: torch.zeros(6))}, "must not be 0"),
    "wrong shape": ({"qualities": quality(lambda o, b: o[0].flatten())}, r"one value per example \[6\]"),
    "direction": (
        {"qualities": quality(lambda o, b: torch.ones(6), "up")},
        "must be minimize or maximize, but is 'up'",
    ),
    "name": ({"qualities": quality(lambda o, b: torch.ones(6), name="bytes")}, "a quality needs a name"),
    "descending": ({"widths": (Width("width", (32, 16)),)}, "must ascend"),
    "last": ({"widths": (Width("width", (8, 16)),)}, "must be the module's own width"),
    "slice raises": ({"slice": lambda _s, module, widths: 1 / 0}, "at 16: ZeroDivisionError"),
    "no slice": ({"slice": TeacherPlugin.slice}, "NotImplementedError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_refused_with_rule_and_value(name: str) -> None:
    attributes, message = BROKEN[name]
    with pytest.raises(UsageError, match=message) as caught:
        check_plugin(PluginTeacher(changed(**attributes)))
    assert caught.value.remedy


def test_warnings(toy: PluginTeacher) -> None:
    assert check_plugin(toy) == []
    (warning,) = check_plugin(PluginTeacher(changed(slice=lambda _s, module, widths: make_net())))
    assert "slicing width of toy to 16 changes no shape" in warning
    (warning,) = check_plugin(PluginTeacher(changed(widths=())))
    assert "names no widths" in warning


class TestToy(PluginConformance):
    plugin = Toy()


def test_the_example_conforms(digits: TeacherPlugin) -> None:
    """As a user's own test class would, every rule of it."""
    mine = type("TestDigits", (PluginConformance,), {"plugin": digits})()
    rules = [name for name in dir(mine) if name.startswith("test_")]
    assert len(rules) == 5
    for name in rules:
        getattr(mine, name)()


def test_sessions_round_no_activations(tmp_path: Path) -> None:
    """ONNX Runtime would round the inputs of 4-bit matrices to 8 bits by itself; this guards the option that forbids it."""
    plugin = Toy()
    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 64, bias=False))
    torch.manual_seed(0)
    batch, weights, matrices = plugin.batches("search")[0], parameters(net), matrices_of(net)
    forms = dict.fromkeys(matrices, Format(4, 32))
    model = ModuleGraph(plugin, still(net), batch).fill(weights, forms)
    wanted = Forwarding(plugin, net).with_weights(effective_weights(weights, matrices, forms), batch.inputs)
    assert parity(run(model, batch, tmp_path), wanted) < PARITY / 10
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    other = torch.from_numpy(session.run(None, {"input0": batch.inputs[0].numpy()})[0])
    assert json.dumps([float((other - wanted[0]).abs().max() / wanted[0].abs().max()) > PARITY])
