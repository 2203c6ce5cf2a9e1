"""What several commands take: the home, a study's name, JSON on stdout, sizes and percentages."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.common.command_line import HOME_VARIABLE, USUAL_HOME, pasted, use_home
from paretune.common.errors import UsageError

if TYPE_CHECKING:
    from paretune.search.study.view import StudyView

HOME = Path(USUAL_HOME)
Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar=HOME_VARIABLE,
        callback=use_home,
        readable=False,
        help="Where studies, caches and the MLflow database live.",
    ),
]


def complete_study(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of the home's studies, the one written last first, for the shell."""
    home = _home_of(ctx)
    found = sorted((home / "studies").glob("*/study.db"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in found if path.parent.name.startswith(incomplete)]


def complete_profile(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of profiles, for the shell."""
    from paretune.hardware_profiles.profile import profile_names

    return [name for name in profile_names(_home_of(ctx).resolve()) if name.startswith(incomplete)]


def _home_of(ctx: typer.Context) -> Path:
    """The home that the line names, as far as it is typed."""
    return Path(str(ctx.params.get("home") or os.environ.get(HOME_VARIABLE) or HOME))


def complete_words(*words: str) -> Callable[[str], list[str]]:
    """The words that begin as what is typed, for the shell."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Study = Annotated[
    str | None, typer.Argument(help="Study id; the latest one if left out.", autocompletion=complete_study)
]


@contextlib.contextmanager
def opened_view(study: str | None, home: Path) -> Iterator[StudyView]:
    """The study as a view, read-only; also while a search runs on it."""
    from paretune.search.study.store import Store
    from paretune.search.study.view import load_view

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
        raise UsageError(
            f"there is no study in {studies}", f"start one with `{pasted('search', home=home)}`, or name its --home"
        )
    return found[-1].parent


def size_in_bytes(text: str | None, option: str) -> float | None:
    """Bytes of a size such as 3MB, 800kB or 12000000. Raises UsageError."""
    if text is None:
        return None
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0, "": 1.0}
    number = text.strip().lower().rstrip("kmgb")
    with contextlib.suppress(ValueError, KeyError):
        value = float(number) * units[text.strip().lower()[len(number) :]]
        return _positive(value, text, option, "a size such as 3MB")
    raise UsageError(f"{option} must be a size such as 3MB, but got {text!r}", "write a number and kB, MB or GB")


def milliseconds(value: float | None, option: str) -> float | None:
    """A limit in milliseconds. Raises UsageError."""
    return positive(value, option, "milliseconds such as 0.5")


def positive(value: float | None, option: str, example: str) -> float | None:
    """A limit in the unit that `example` names. Raises UsageError."""
    return None if value is None else _positive(value, f"{value:g}", option, example)


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Positive whole numbers such as 32,128. Raises UsageError."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        found = tuple(int(part) for part in text.split(","))
        if min(found) > 0:
            return found
    raise UsageError(
        f"{option} must be positive whole numbers such as 32,128, but got {text!r}", "separate them by commas"
    )


def fraction(text: str | None, option: str) -> float | None:
    """A fraction such as 0.01, or 1% as one. Raises UsageError."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        value = float(text.strip().rstrip("%")) / (100 if text.strip().endswith("%") else 1)
        return _positive(value, text, option, "a percentage such as 1%")
    raise UsageError(f"{option} must be a percentage such as 1% or 0.01, but got {text!r}", "write a percentage")


def _positive(value: float, text: str, option: str, example: str) -> float:
    if value > 0 and math.isfinite(value):
        return value
    raise UsageError(f"{option} must be more than 0 and finite, but got {text!r}", f"give {example}, or leave it out")
