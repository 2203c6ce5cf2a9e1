"""The registered model of a teacher: a version per recommended candidate, an alias per hardware profile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paretune.search.study.view import Point, StudyView
from paretune.tracking.wording import measurement, named, plain

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARTIFACT = "artifact"


@dataclass
class Registry:
    """Versions and aliases of one study's teacher."""

    client: MlflowClient
    view: StudyView

    def register(self, run: Run, point: Point, profile: str) -> None:
        """A version for the candidate of `run`, whose artifact MLflow has, with the alias of `profile`."""
        name = model_name(self.view)
        aliases = self._registered_model(name)
        versions = {str(v.version): v for v in self.client.search_model_versions(f"name = {quoted(name)}")}
        version = next((v for v in versions.values() if v.run_id == run.info.run_id), None)
        if version is None:
            version = self._create(name, run, point)
        alias = alias_of(profile)
        current = versions.get(str(aliases.get(alias)))
        if str(aliases.get(alias)) != str(version.version) and not self._is_newer(current):
            self.client.set_registered_model_alias(name, alias, version.version)

    def _create(self, name: str, run: Run, point: Point) -> Any:
        hardware = named(self.view.meta.get("profile"))
        tags = {
            "study": self.view.study,
            "hardware": hardware,
            "paretune.candidate": point.key,
            "paretune.created": str(self.view.meta.get("created")),
        }
        source = f"{run.info.artifact_uri}/{ARTIFACT}"
        text = f"{summary(point)} (searched on {hardware})"
        return self.client.create_model_version(
            name, source, run.info.run_id, await_creation_for=None, tags=tags, description=text
        )

    def _registered_model(self, name: str) -> dict[str, Any]:
        """Create the registered model if need be; returns its aliases with their versions."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self.client.get_registered_model(name).aliases)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        teacher = named(self.view.meta.get("teacher"))
        text = f"Students of {teacher}; an alias per hardware profile names the recommended one."
        self.client.create_registered_model(name, description=text)
        return {}

    def _is_newer(self, version: Any) -> bool:
        """Whether an alias already points into a younger study: rebuilding an old one must not turn it back."""
        return version is not None and str(version.tags.get("paretune.created", "")) > str(
            self.view.meta.get("created")
        )


def summary(point: Point) -> str:
    """A candidate in a line, figures first: lists cut long lines off."""
    names = ("relative_loss", point.figures.latency, "compressed_bytes")
    found = ((name, measurement(point, name)) for name in names)
    return f"{', '.join(_figure(name, m) for name, m in found if m is not None)}: {point.name}; {point.description}"


def _figure(name: str, m: Any) -> str:
    text = plain(name, m.value, m.unit) + (" loss" if name == "relative_loss" else "")
    return text if m.provenance == "measured" else f"{text} ({m.provenance})"


def model_name(view: StudyView) -> str:
    """Name of the registered model of a study's teacher."""
    return "student-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", named(view.meta.get("teacher"))).strip(".-")


def alias_of(profile: str) -> str:
    """A profile's alias: its name, but for the names that MLflow reserves."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", profile)
    return f"hw-{name}" if re.fullmatch(r"latest|v\d+", name, re.IGNORECASE) else name


def quoted(value: str) -> str:
    """A string in a filter: MLflow takes quotes but no escapes, a name with both kinds is refused."""
    return f"'{value}'" if "'" not in value else f'"{value}"'
