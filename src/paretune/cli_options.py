"""What several commands take: the home, a study's name, JSON on stdout, sizes and percentages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.hardware_profiles.errors import UsageError

if TYPE_CHECKING:
    from paretune.search.view import StudyView

Home = Annotated[
    Path, typer.Option("--home", envvar="PARETUNE_HOME", help="Where studies, caches and the MLflow database live.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Study = Annotated[str | None, typer.Argument(help="Study id; the latest one if left out.")]
HOME = Path("mlruns")


@contextlib.contextmanager
def opened_view(study: str | None, home: Path) -> Iterator[StudyView]:
    """The study as a view, read-only; also while a search runs on it."""
    from paretune.search.store import Store
    from paretune.search.view import load_view

    store = Store.reader(study_folder(study, home))
    try:
        yield load_view(store)
    finally:
        store.close()


def study_folder(study: str | None, home: Path) -> Path:
    """Folder of the named study, or of the one that was written last."""
    studies = home.resolve() / "studies"
    if study is not None:
        if Path(study).name != study:
            raise UsageError(
                f"a study is named by its id, but got {study!r}", "use the name that `paretune search` printed"
            )
        return studies / study
    found = sorted(studies.glob("*/study.db"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"there is no study in {studies}", "start one with `paretune search`, or name its --home")
    return found[-1].parent


def size_in_bytes(text: str | None, option: str) -> float | None:
    """Bytes of a size such as 3MB, 800kB or 12000000."""
    if text is None:
        return None
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0, "": 1.0}
    number = text.strip().lower().rstrip("kmgb")
    with contextlib.suppress(ValueError, KeyError):
        return float(number) * units[text.strip().lower()[len(number) :]]
    raise UsageError(f"{option} must be a size such as 3MB, but got {text!r}", "write a number and kB, MB or GB")


def fraction(text: str | None) -> float | None:
    """A fraction such as 0.01, or 1% as one."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    raise UsageError(f"--max-loss must be like 1% or 0.01, but got {text!r}", "write a percentage")
