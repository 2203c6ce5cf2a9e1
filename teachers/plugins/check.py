"""What a plug-in must keep to, checked before a search starts and by the author's own tests.

    class TestMine(PluginConformance):
        plugin = Mine()

is a whole test file for pytest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn

from paretune.common.errors import UsageError
from paretune.teachers.plugins.plugin import (
    PLAIN_NAME,
    Batch,
    Forwarding,
    PluginTeacher,
    Quality,
    TeacherPlugin,
    Width,
    explained,
    still,
)
from paretune.teachers.text.corpus import SPLITS

DIRECTIONS = ("minimize", "maximize")
QUALITY_NAME = re.compile(r"^[a-z][a-z0-9_]{0,39}$")
RESERVED = re.compile(r"^nll$|bytes$|^forward_|^load_ms$|^relative_loss$|^estimated_|_increase$|^negative_|_ms$")


def check_plugin(teacher: PluginTeacher) -> list[str]:
    """Warnings about a plug-in that can be searched. Raises UsageError with rule, value and remedy about one that cannot."""
    plugin = teacher.plugin
    with explained(plugin.name, "run"):
        check_batches(plugin)
        check_module(teacher)
        check_forward(teacher)
        check_qualities(teacher)
        return list(check_widths(teacher))


def check_module(teacher: PluginTeacher) -> None:
    """`load` gives a module of finite floats, the same every time."""
    for name, value in teacher.module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            _refuse(teacher, f"weights must be finite, but {name} holds NaN or infinity", "load a trained checkpoint")
        if value.device.type != "cpu":
            _refuse(teacher, f"the module must be on the CPU, but {name} is on {value.device}", "call .cpu() in load()")
    again = PluginTeacher(teacher.plugin)
    if again.digest != teacher.digest:
        _refuse(
            teacher,
            "load() must give the same weights every time, but two calls differ",
            "read them from a file, or seed what makes them",
        )


def check_batches(plugin: TeacherPlugin) -> None:
    """Every split has batches, and all of them one shape."""
    shapes: dict[Any, str] = {}
    for split in SPLITS:
        batches = plugin.batches(split)
        if not batches:
            _refuse(plugin, f"every split must have a batch, but {split!r} has none", "give it at least one")
        for batch in batches:
            if not isinstance(batch, Batch) or not batch.inputs or not all(torch.is_tensor(x) for x in batch.inputs):
                _refuse(
                    plugin,
                    f"batches({split!r}) must give Batch(inputs=(tensor, …)), but gave {type(batch).__name__}",
                    "wrap the tensors in paretune.teachers.plugins.plugin.Batch",
                )
            shapes.setdefault(tuple((tuple(x.shape), str(x.dtype)) for x in batch.inputs), split)
    if len(shapes) > 1:
        _refuse(
            plugin,
            f"all batches must have the same input shapes, but there are {' and '.join(map(str, list(shapes)[:2]))}",
            "drop or fill up the last batch of a split",
        )


def check_forward(teacher: PluginTeacher) -> None:
    """Outputs are finite tensors, and the same every time."""
    batch = teacher.plugin.batches("calibration")[0]
    first, second = _outputs(teacher, batch), _outputs(teacher, batch)
    for a, b in zip(first, second, strict=True):
        if not torch.isfinite(a).all():
            _refuse(teacher, "outputs must be finite, but one holds NaN or infinity", "look at the inputs' range")
        if not torch.equal(a, b):
            _refuse(
                teacher,
                f"forward must be deterministic in evaluation mode, but two runs differ by {float((a - b).abs().max()):.2g}",
                "take random draws as an input, or use their mean",
            )


def check_qualities(teacher: PluginTeacher) -> None:
    """Names, units and directions are legible; values are finite, and the teacher's own is not zero."""
    plugin = teacher.plugin
    if not plugin.qualities:
        _refuse(plugin, "there must be a quality to search for, but qualities is empty", "add a Quality")
    if len({q.name for q in plugin.qualities}) != len(plugin.qualities):
        _refuse(
            plugin, f"qualities must have different names, but got {[q.name for q in plugin.qualities]}", "rename one"
        )
    for quality in plugin.qualities:
        if not QUALITY_NAME.match(quality.name) or RESERVED.search(quality.name) or not quality.unit:
            _refuse(
                plugin,
                f"a quality needs a name like psnr (letters, digits, _; none that paretune measures itself) and a unit, but got "
                f"{quality.name!r}, {quality.unit!r}",
                "rename it",
            )
        if quality.direction not in DIRECTIONS:
            _refuse(
                plugin,
                f"the direction of {quality.name} must be minimize or maximize, but is {quality.direction!r}",
                "say which is better",
            )
        values = [quality_values(plugin, quality, _outputs(teacher, b), b) for b in plugin.batches("search")]
        mean = float(torch.cat(values).mean())
        if mean == 0.0 and quality is plugin.qualities[0]:
            _refuse(
                plugin,
                f"the teacher's own {quality.name} must not be 0, because losses are told as fractions of it",
                "measure against the data, not against the teacher",
            )


def quality_values(
    plugin: TeacherPlugin, quality: Quality, outputs: tuple[torch.Tensor, ...], batch: Batch
) -> torch.Tensor:
    """float64 values of one quality [examples or 1]. Raises UsageError if they are not finite or have another shape."""
    values = torch.as_tensor(quality.function(outputs, batch)).detach().double()
    examples = batch.inputs[0].shape[0] if batch.inputs[0].ndim else 1
    if values.ndim > 1 or (values.ndim == 1 and len(values) != examples):
        _refuse(
            plugin,
            f"{quality.name} must give one value per example [{examples}] or per batch [], but gave {list(values.shape)}",
            "average over everything but the batch dimension",
        )
    if not torch.isfinite(values).all():
        _refuse(
            plugin, f"{quality.name} must be finite, but is {values[~values.isfinite()][0]:.0f}", "mend its function"
        )
    return values.reshape(-1)


def check_widths(teacher: PluginTeacher) -> Iterator[str]:
    """Slicing gives a smaller module of the same outputs and names; warns of a choice that changes no shape."""
    plugin = teacher.plugin
    if not plugin.widths:
        yield f"{plugin.name} names no widths: precision and sparsity are searched, sizes are not"
        return
    if len({w.name for w in plugin.widths}) != len(plugin.widths):
        _refuse(plugin, f"widths must have different names, but got {[w.name for w in plugin.widths]}", "rename one")
    full = {width.name: width.choices[-1] for width in plugin.widths if width.choices}
    for width in plugin.widths:
        if not PLAIN_NAME.match(width.name):
            _refuse(
                plugin, f"a width's name must have letters, digits, '_' and '-', but is {width.name!r}", "rename it"
            )
        if not width.choices or list(width.choices) != sorted(set(width.choices)) or width.choices[0] < 1:
            _refuse(
                plugin,
                f"the choices of {width.name} must ascend from at least 1, but are {width.choices}",
                "list each once, the module's own width last",
            )
        yield from _check_width(teacher, width, full)


def _check_width(teacher: PluginTeacher, width: Width, full: dict[str, int]) -> Iterator[str]:
    plugin, before = teacher.plugin, shapes_of(teacher.module)
    batch = plugin.batches("calibration")[0]
    expected = [x.shape for x in _outputs(teacher, batch)]
    for choice in width.choices:
        try:
            module = still(plugin.slice(teacher.module, {**full, width.name: choice}))
            with torch.no_grad():
                outputs = Forwarding(plugin, module)(*batch.inputs)
        except Exception as error:
            raise UsageError(
                f"the plug-in {plugin.name} must slice {width.name} to each of {width.choices}, but at {choice}: "
                f"{type(error).__name__}: {error}",
                "mend slice(), or leave out that choice",
            ) from error
        after = shapes_of(module)
        if [x.shape for x in outputs] != expected or not set(after) <= set(before):
            _refuse(
                plugin,
                f"slicing {width.name} to {choice} must keep the outputs' shapes and the parameters' names, but changes them",
                "mend slice()",
            )
        if choice == width.choices[-1] and after != before:
            _refuse(
                plugin,
                f"the last choice of {width.name} must be the module's own width, but slicing to {choice} changes shapes",
                "put the module's own width last",
            )
        if choice != width.choices[-1] and after == before:
            yield f"slicing {width.name} of {plugin.name} to {choice} changes no shape"
    if shapes_of(teacher.module) != before:
        _refuse(plugin, "slice() must leave the given module as it is, but changed it", "copy before cutting")


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its name."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _outputs(teacher: PluginTeacher, batch: Batch) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = Forwarding(teacher.plugin, teacher.module)(*batch.inputs)
    if not found or not all(torch.is_tensor(x) for x in found):
        kinds = ", ".join(type(x).__name__ for x in found) or "nothing"
        _refuse(teacher, f"forward must give a tensor or a tuple of tensors, but gave {kinds}", "wrap it in forward()")
    return found


def _refuse(plugin: TeacherPlugin | PluginTeacher, problem: str, remedy: str) -> NoReturn:
    raise UsageError(f"the plug-in {plugin.name}: {problem}", remedy)


class PluginConformance:
    """Derive a pytest class from this and set `plugin`; every rule is a test of its own."""

    plugin: ClassVar[TeacherPlugin]

    @property
    def teacher(self) -> PluginTeacher:
        """The plug-in as a teacher, loaded anew each time."""
        return PluginTeacher(self.plugin)

    def test_the_module_is_sound(self) -> None:
        """`load` gives a module of finite weights on the CPU, the same every time."""
        check_module(self.teacher)

    def test_every_split_has_batches_of_one_shape(self) -> None:
        """Every split has batches, and all of them the same input shapes."""
        check_batches(self.plugin)

    def test_forward_is_deterministic(self) -> None:
        """Two runs on the same batch give the same finite outputs."""
        check_forward(self.teacher)

    def test_qualities_are_finite(self) -> None:
        """Qualities have proper names, units and directions, and finite values."""
        check_qualities(self.teacher)

    def test_slicing_shrinks(self) -> None:
        """Every choice of a width but the last gives a smaller module with outputs of the same shapes."""
        warnings = [w for w in check_widths(self.teacher) if "changes no shape" in w]
        assert not warnings, "; ".join(warnings)
