"""The studies of a home: make one, find the one that goes on."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

from paretune.common.command_line import pasted
from paretune.common.errors import ParetuneError, UsageError
from paretune.common.file_access import unwritable
from paretune.common.files import write_atomically
from paretune.common.version import VERSION
from paretune.hardware_profiles import detect_local, fingerprint, package_version
from paretune.objectives.profiler.findings import kept_findings
from paretune.search.prepare.ready import Ready
from paretune.search.study.control import ENDED
from paretune.search.study.store import Store
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.plugins.name import is_plugin

PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-genai",
    "onnx",
    "transformers",
    "optuna",
    "ray",
    "mlflow",
    "numpy",
    "sqlalchemy",
)
STUDY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}\Z")


def create_study(ready: Ready, home: Path, study: str, command: str) -> Store:
    """A new study folder with its settings."""
    folder = home / "studies" / study
    text = "standard library of the running Python" if ready.spec.data is None else ready.spec.data
    own = ready.plugin is not None
    if not (folder / "study.db").exists():
        _write_setup(ready, folder)
    store = Store.create(
        folder,
        {
            "state": "new",
            "spec": ready.spec.model_dump(mode="json"),
            "identity": ready.identity,
            "profile": ready.profile.model_dump(mode="json"),
            "seed": ready.spec.seed,
            "teacher": {
                "name": ready.teacher.name,
                "digest": ready.teacher.digest,
                "parameters": ready.teacher.parameters,
                **({"context": ready.teacher.context} if isinstance(ready.teacher, Teacher) else {}),
            },
            "corpus": {"source": "the plug-in's own data" if own else text, "fingerprint": ready.text},
            "budget_s": ready.spec.budget_s,
            "space_size": ready.plan.space_size,
            "machine": {**detect_local().__dict__, "fingerprint": fingerprint()},
            "versions": {
                "paretune": VERSION,
                "python": platform.python_version(),
                **{name: package_version(name) for name in PACKAGES},
            },
            "command": command,
            "launches": 0,
            **_told(ready, home),
            **({} if ready.plugin is None else {"figures": ready.plugin.figures.to_dict()}),
        },
    )
    return store


def _told(ready: Ready, home: Path) -> dict[str, Any]:
    """The study's notes, and the findings of `paretune op-profile` that its first candidates come from, if there are any."""
    notes = list(ready.plan.notes)
    own = ready.plugin is None and ready.spec.sampler != "sequential"  # which has no first candidates
    findings = kept_findings(home / "cache", ready.teacher.digest, ready.profile) if own else None
    if findings is None:
        return {"notes": notes}
    return {"notes": [*notes, f"seeded from the profile: {findings.text}"], "findings": findings.to_dict()}


def _write_setup(ready: Ready, folder: Path) -> None:
    """What workers read; written before the database, so that a study that exists is complete."""
    setup = {
        "spec": ready.spec.model_dump(mode="json"),
        "profile": ready.profile.model_dump(mode="json"),
        "mild": ready.space.mild,
        "text": ready.text,
    }
    if ready.plugin is not None:
        setup["plugin_folder"] = str(ready.plugin.folder)
    try:
        write_atomically(folder / "setup.json", json.dumps(setup, indent=1).encode())
    except OSError as error:
        raise unwritable(folder, error, "free the disk or choose a folder with --home", "the study folder") from None


def find_study(home: Path, ready: Ready, wanted: str | None) -> tuple[str, bool]:
    """(study id, whether it exists and can go on). The same search again continues an unfinished study, else a new id is made.

    Raises UsageError if the wanted study has an impossible name, is complete, or is another search (other settings, teacher,
    text, profile or machine).
    """
    folder = home / "studies"
    if wanted is not None:
        if not STUDY_NAME.match(wanted):
            raise UsageError(
                f"a study's name has letters, digits, '.', '_' and '-' only, but got {wanted!r}",
                "choose another --study",
            )
        if not (folder / wanted / "study.db").exists():
            return wanted, False
        identity, state = _identity(folder / wanted)
        if state in ENDED:
            raise UsageError(
                f"the study {wanted!r} is {state}",
                f"look at it with `{pasted('report', wanted, home=home)}`, or use another --study name",
            )
        if identity != ready.identity:
            raise UsageError(
                f"the study {wanted!r} was started with other settings, or the teacher, text, profile or machine has changed since",
                "use what it was started with, or another --study name",
            )
        return wanted, True
    for path in sorted(folder.glob("*/study.db"), key=lambda p: p.stat().st_mtime, reverse=True):
        with contextlib.suppress(ParetuneError):  # a damaged study must not block a new one
            identity, state = _identity(path.parent)
            if identity == ready.identity and state not in ENDED:
                return path.parent.name, True
    base = (
        f"{re.sub('[^a-z0-9-]+', '-', Path(_short_name(ready.spec.teacher)).name.lower())}-{datetime.date.today():%m%d}"
    )
    number = 1
    while (folder / f"{base}-{number}").exists():
        number += 1
    return f"{base}-{number}", False


def _short_name(teacher: str) -> str:
    """What a study is called after: the folder, or the last part of a plug-in's name."""
    return teacher.rsplit(":", 1)[-1] if is_plugin(teacher) else teacher


def _identity(folder: Path) -> tuple[str | None, str | None]:
    store = Store.reader(folder)
    try:
        return store.meta("identity"), store.meta("state")
    finally:
        store.close()
