"""Quality of a plug-in's module: its own functions, normalised once so that the first is minimized, with paired intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretune.common.errors import Infeasible, UsageError
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import FORWARD, MetricNames
from paretune.objectives.quality.quality import Scores, interval_of_ratio, paired_difference, relative
from paretune.teachers.plugins.check import quality_values
from paretune.teachers.plugins.plugin import Batch, Outputs, TeacherPlugin

MOST_CLUSTERS = 256
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """The first quality, minimized, in clusters of examples; and the values of all qualities in their own directions."""

    scores: Scores
    values: dict[str, Array]


def metric_names_of(plugin: TeacherPlugin) -> MetricNames:
    """What a study of this plug-in calls its numbers; `forward_ms` is one forward at the plug-in's batch shape."""
    first = plugin.qualities[0]
    labels = [(q.name, f"{q.name.replace('_', ' ')} ({q.unit})") for q in plugin.qualities]
    objective = first.objective.replace("_", " ")
    labels += [
        (first.objective, f"{objective} ({first.unit})"),
        (f"estimated_{first.objective}", f"estimated {objective} ({first.unit})"),
        (FORWARD, "forward (ms)"),
        ("relative_loss", f"{objective} increase (fraction)"),
    ]
    others = tuple(q.name for q in plugin.qualities if q.name != first.objective)
    return MetricNames(first.objective, first.unit, ((FORWARD, "ms"),), others, tuple(dict(labels).items()))


def judge(plugin: TeacherPlugin, batches: Sequence[Batch], outputs: Iterable[Outputs]) -> Judged:
    """Scores of a module's `outputs` for `batches`. Raises Infeasible where a quality is not finite."""
    columns: dict[str, list[Array]] = {q.name: [] for q in plugin.qualities}
    for batch, found in zip(batches, outputs, strict=True):
        for quality in plugin.qualities:
            try:
                columns[quality.name].append(quality_values(plugin, quality, found, batch).numpy())
            except UsageError as error:  # of the teacher this is the plug-in's fault, here the candidate's
                raise Infeasible(error.problem, "") from error
    values = {name: np.concatenate(found) for name, found in columns.items()}
    first = plugin.qualities[0]
    return Judged(_clustered(first.sign * values[first.name]), values)


def module_measurements(
    plugin: TeacherPlugin, judged: Judged, teacher: Scores, fingerprint: str
) -> dict[str, Measurement]:
    """The minimized quality, its increase and relative_loss against the teacher, and every other quality in its own direction."""
    first, scores = plugin.qualities[0], judged.scores
    samples = int(sum(scores.targets))
    note = f"95 % interval over {len(scores.documents)} groups of examples"

    def made(triple: tuple[float, float, float], unit: str) -> Measurement:
        return Measurement(triple[0], unit, triple[1], triple[2], "measured", samples, fingerprint, note)

    increase, base = paired_difference(scores, teacher), teacher.mean_nll
    weights = np.array(scores.targets, np.float64)
    found = {
        first.objective: made(interval_of_ratio(np.array(scores.nll), weights), first.unit),
        f"{first.objective}_increase": made(increase, first.unit),
        "relative_loss": made(
            (relative(increase[0], base), relative(increase[1], base), relative(increase[2], base)),
            f"fraction of the teacher's {first.objective}",
        ),
    }
    for quality in plugin.qualities:
        if quality.name not in found:
            found[quality.name] = made(_interval(judged.values[quality.name]), quality.unit)
    return found


def _interval(values: Array) -> tuple[float, float, float]:
    scores = _clustered(values)
    return interval_of_ratio(np.array(scores.nll), np.array(scores.targets, np.float64))


def _clustered(values: Array) -> Scores:
    """Sums over at most 256 runs of examples, which is what the store keeps and the bootstrap resamples."""
    clusters = min(len(values), MOST_CLUSTERS)
    index = np.arange(len(values)) * clusters // len(values)
    sums = np.bincount(index, weights=values, minlength=clusters)
    counts = np.bincount(index, minlength=clusters)
    return Scores(tuple(str(i) for i in range(clusters)), tuple(map(float, sums)), tuple(map(int, counts)))
