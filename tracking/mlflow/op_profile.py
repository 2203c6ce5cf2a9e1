"""A profile as a run of its own in MLflow, with its figures as metrics and its files as artifacts."""

from __future__ import annotations

from pathlib import Path

from paretune.objectives.profiler.op_costs import PHASES
from paretune.objectives.profiler.op_profile import OpProfile
from paretune.tracking.mlflow.sink import MlflowSink, one_line

SOURCE = "paretune"


def log_profile(home: Path, found: OpProfile, folder: Path) -> str | None:
    """A new run `profile <name>` with the files of `folder`; returns a problem in one line instead of raising: the files are
    there anyway."""
    try:
        _log(home, found, folder)
    except Exception as error:  # a view that fails is reported, never fatal
        return one_line(error)
    return None


def _log(home: Path, found: OpProfile, folder: Path) -> None:
    with MlflowSink(home).opened() as (client, experiment):
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        tags = {
            "kind": "profile",
            "mlflow.source.name": SOURCE,
            "teacher" if found.subject.kind == "teacher" else "artifact": found.subject.name,
            "hardware": str(found.settings["profile"]),
            "mlflow.note.content": note(found),
        }
        params = {**found.settings, "digest": found.subject.digest, "kind": found.subject.kind}
        run = client.create_run(experiment, now, None, f"profile {found.subject.name}").info.run_id
        client.log_batch(
            run,
            [Metric(name, value, now, 0) for name, value in metrics(found).items()],
            [Param(name, str(value)) for name, value in params.items()],
            [RunTag(name, value) for name, value in tags.items()],
        )
        client.log_artifacts(run, str(folder))
        client.set_terminated(run)


def metrics(found: OpProfile) -> dict[str, float]:
    """Latencies, memory, roofline, and each group's milliseconds by phase."""
    own = {name: m.value for name, m in found.measurements.items()}
    roof = {
        "roof_bandwidth_gb_per_s": found.roof.bandwidth_gb_per_s,
        "roof_fp32_gflop_per_s": found.roof.fp32_gflop_per_s,
    }
    groups = {f"{phase}_{t.label}_ms": t.ms for phase in PHASES for t in found.totals(phase, "groups")}
    return own | roof | groups


def note(found: OpProfile) -> str:
    """The run's description in Markdown."""
    rows = [
        f"| {p.text} | {p.decode_ms.value:.4f} [{p.decode_ms.low:.4f} … {p.decode_ms.high:.4f}] |" for p in found.best
    ]
    head = ["| where compression would pay | ms per decode step saved (predicted) |", "| --- | --- |"]
    return "\n".join([f"### {found.subject.name}: {found.subject.description}", "", *head, *rows, "", *found.notes])
