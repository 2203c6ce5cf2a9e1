"""The experiment that holds all studies, with a description and ready-made views of MLflow's runs page.

MLflow keeps a saved view as a tag of the experiment: its name and the page's state (filter, order, columns, charts) as JSON.
That form belongs to MLflow's page, so the version of MLflow is bounded in pyproject.toml and a browser test opens every view.
A version that does not know a view ignores its tag.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "paretune"
VIEW_TAG = "mlflow.sharedViewState."
DIGEST = "paretune.views"
SAVED_AT = 1_700_000_000_000  # Milliseconds; MLflow lists views by their time, the latest first, and ours never change.
QUALITY, LATENCY, SIZE = "nll", "decode_ms_per_token", "compressed_bytes"
# Axes of the parallel coordinates: what was chosen, then what it costs. All are numbers, so that every axis is a scale.
CHOICES = ("layers", "ffn_width", "bits", "sparsity")
COSTS = (SIZE, LATENCY, QUALITY)
FIGURES = ("metrics.`nll`", "metrics.`relative_loss`", "metrics.`decode_ms_per_token`", "metrics.`compressed_bytes`")
COLUMNS = (
    "tags.`study`",
    *FIGURES,
    "tags.`hardware`",
    "tags.`recommended`",
    "params.`layers`",
    "params.`ffn_width`",
    "params.`bits`",
    "params.`sparsity`",
)
STUDY_COLUMNS = (
    *FIGURES,
    "metrics.`front_members`",
    "metrics.`explored`",
    "tags.`hardware`",
    "tags.`teacher`",
    "tags.`state`",
)
WIDTHS = {"tags.`study`": 160, FIGURES[1]: 115, FIGURES[2]: 175, FIGURES[3]: 150, "tags.`recommended`": 125}  # Pixels.
NOTE = """Compressed students of one teacher per study, found by a joint search over size, sparsity and precision.

A run of kind `study` holds the answer; its child runs (kind `candidate`) are confirmed on the file that ships. **Views** at the
top right are ready-made comparisons. Filters that help: `tags.pareto = 'true'`, `tags.recommended = 'true'`,
`tags.hardware = 'local-cpu'`, `tags.study = 'NAME'`, `metrics.relative_loss < 0.03`.
"""


@dataclass(frozen=True)
class SavedView:
    """One entry of MLflow's Views menu."""

    key: str
    name: str
    condition: str
    columns: tuple[str, ...] = COLUMNS

    def tag(self, position: int) -> str:
        """Value of its tag; a lower `position` stands higher in the menu."""
        times = {"createdAt": SAVED_AT - position, "updatedAt": SAVED_AT - position}
        return json.dumps({"name": self.name, **times, "state": json.dumps(self.state())})

    def state(self) -> dict[str, Any]:
        """What MLflow's page restores: facets of the search, the table, the charts."""
        return {
            "searchFilter": self.condition,
            "orderByKey": "metrics.`nll`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": list(self.columns),
            "columnOrder": list(self.columns),
            "columnWidths": {name: WIDTHS.get(name, 95) for name in self.columns},
            "runsHiddenMode": "SHOW_ALL",  # else only the first ten are drawn
            "hideEmptyCharts": True,
            "isAccordionReordered": True,  # else our section would be sorted behind the generated ones
            "compareRunSections": [
                _section("front", "Pareto front", columns=2, cardHeight=400),
                _section("axes", "Choices and costs", columns=1, cardHeight=420),
                _section("metrics", "Model metrics"),
            ],
            "compareRunCharts": _charts(),
        }


VIEWS = (
    SavedView("fronts", "Fronts of all studies", "tags.kind = 'candidate' and tags.pareto = 'true'"),
    SavedView("recommended", "Recommended, one per study", "tags.kind = 'candidate' and tags.recommended = 'true'"),
    SavedView("confirmed", "All confirmed candidates", "tags.kind = 'candidate'"),
    SavedView("studies", "Studies", "tags.kind = 'study'", STUDY_COLUMNS),
)


def experiment_of(client: MlflowClient, location: str | None) -> str:
    """Id of our experiment, made or restored if need be; `location` is where a new one keeps its files."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        identity = str(client.create_experiment(EXPERIMENT, artifact_location=location))
        _arrange(client, identity)
        return identity
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if found.tags.get(DIGEST) != _digest():
        _arrange(client, found.experiment_id)
    return str(found.experiment_id)


def runs_page(experiment: str, view: str) -> str:
    """Route of a saved view in the chart view of MLflow's page, on its side for models."""
    return (
        f"/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={view}&compareRunsMode=CHART"
    )


def _arrange(client: MlflowClient, experiment: str) -> None:
    """Once per form of the views, so that a view that a user deleted stays away. The digest goes last: a crash repeats this."""
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")
    client.set_experiment_tag(experiment, "mlflow.note.content", NOTE)
    for position, view in enumerate(VIEWS):
        client.set_experiment_tag(experiment, VIEW_TAG + view.key, view.tag(position))
    client.set_experiment_tag(experiment, DIGEST, _digest())


def _digest() -> str:
    return hashlib.sha256(json.dumps([view.tag(i) for i, view in enumerate(VIEWS)]).encode()).hexdigest()[:16]


def _section(key: str, name: str, **layout: int) -> dict[str, Any]:
    """A heading with its cards; `layout` says how many stand side by side and how high they are in pixels."""
    fixed = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": key, "name": name, **fixed, **layout}


def _charts() -> list[dict[str, Any]]:
    """Quality against latency and size, and parallel coordinates through choices and costs."""

    def chart(section: str, kind: str, key: str, **more: Any) -> dict[str, Any]:
        fixed = {"metricSectionId": section, "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
        return {"uuid": key, "type": kind, **fixed, **more}

    def axis(name: str) -> dict[str, str]:
        return {"key": name, "type": "METRIC"}

    axes = {"selectedParams": list(CHOICES), "selectedMetrics": list(COSTS), "showAllRuns": True}
    return [
        *(chart("front", "SCATTER", f"nll-{x}", xaxis=axis(x), yaxis=axis(QUALITY)) for x in (LATENCY, SIZE)),
        chart("axes", "PARALLEL", "choices-costs", **axes),
    ]
