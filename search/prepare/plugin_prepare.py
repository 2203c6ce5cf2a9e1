"""What is checked before a search over a plug-in's module starts, and the settings that follow from the plug-in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from paretune.common.errors import Infeasible, UsageError
from paretune.compression.calibration.modules import matrices_of, shape_of_module
from paretune.compression.export.module_graph import ModuleGraph
from paretune.hardware_profiles import load_profile
from paretune.objectives.metric_names import FORWARD, MetricNames
from paretune.objectives.quality.module_quality import metric_names_of
from paretune.search.layout import layout_of
from paretune.search.prepare.plan import make_plan
from paretune.search.prepare.ready import PluginSetup, Ready, check_affordable
from paretune.search.spec import Spec
from paretune.search.targets.profiles import require_measurable
from paretune.spaces.module_space import ModuleSpace
from paretune.teachers.plugins.check import check_plugin
from paretune.teachers.plugins.plugin import PluginTeacher, find_plugin
from paretune.teachers.text.corpus import SPLITS

LOSS_OF_INTEREST = 10.0


def prepare_plugin(spec: Spec, home: Path, address: str | None = None) -> Ready:
    """Load and check the plug-in, export it once, and settle the objectives. Raises UsageError or EnvironmentProblem."""
    if spec.data is not None or spec.field is not None:
        raise UsageError(
            f"a plug-in brings its own data, but got --data {spec.data}",
            "leave --data out, or change the plug-in's batches",
        )
    if spec.sampler == "sequential":
        raise UsageError(
            "the sequential sampler orders a decoder's axes, but the teacher is a plug-in", "use tpe or nsga2"
        )
    folder = Path.cwd()
    teacher = PluginTeacher(find_plugin(spec.teacher, folder))
    notes = check_plugin(teacher)
    _check_matrices(teacher)
    profile, figures = load_profile(spec.profile, home), metric_names_of(teacher.plugin)
    require_measurable(profile, address)
    spec = settle(spec, figures)
    space = ModuleSpace.of(shape_of_module(teacher.plugin, teacher.module), profile.weight_formats)
    counted: dict[str, int] = {name: sum(len(b.inputs[0]) for b in teacher.plugin.batches(name)) for name in SPLITS}
    plan = make_plan(
        spec, teacher, profile, space, counted, home, notes, layout_of(spec, profile, address), address is None
    )
    plan = replace(plan, text_what="batches of the plug-in", text_unit="examples")
    check_affordable(plan, spec, home)
    _check_export(teacher)
    return Ready(spec, teacher, profile, space, plan, teacher.digest, PluginSetup(figures, folder))


def settle(spec: Spec, figures: MetricNames) -> Spec:
    """The settings with what a plug-in's names stand for: its objectives, and which losses are of interest.

    A loss is a fraction of the plug-in's own quality, which may have any scale, and a slice of the teacher is not trained at
    rung 0, so its loss there says little: with less than ten times the teacher's no smaller size would ever be recovered.
    """
    given = spec.model_fields_set
    allowed = (figures.quality, FORWARD, "compressed_bytes", "bytes", "peak_memory_bytes")
    if "objectives" in given and (figures.quality not in spec.objectives or not set(spec.objectives) <= set(allowed)):
        raise UsageError(
            f"the objectives of this plug-in are {figures.quality} and others of {', '.join(allowed[1:])}, but got "
            f"{', '.join(spec.objectives)}",
            "change them, or leave them out",
        )
    for name in spec.limits:
        if name not in allowed:
            raise UsageError(f"a limit of this plug-in is one of {', '.join(allowed[1:])}, but got {name}", "rename it")
    changed = {
        "objectives": spec.objectives if "objectives" in given else figures.objectives(),
        "loss_of_interest": spec.loss_of_interest if "loss_of_interest" in given else LOSS_OF_INTEREST,
    }
    return spec.model_copy(update=changed)


def _check_matrices(teacher: PluginTeacher) -> None:
    if not matrices_of(teacher.module):
        raise UsageError(
            f"the plug-in {teacher.name} must have weights of Linear or convolutions, but has none: nothing can be compressed",
            "export modules of torch.nn, not functions with tensors of their own",
        )


def _check_export(teacher: PluginTeacher) -> None:
    """A module that cannot be exported is refused before any work."""
    try:
        ModuleGraph(teacher.plugin, teacher.module, teacher.plugin.batches("calibration")[0])
    except Infeasible as error:
        raise UsageError(
            error.problem, "change the module's forward: torch.onnx.export(..., dynamo=True) must take it"
        ) from error
