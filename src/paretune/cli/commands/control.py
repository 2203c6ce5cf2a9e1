"""The control commands, for any search: pause, resume, stop, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.terminal.console import print_json, print_text
from paretune.cli.terminal.options import HOME, Home, Json, Study, study_folder

if TYPE_CHECKING:
    from pathlib import Path

    from paretune.search.study.control import Verb


def pause(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Pause a search after its running task; the budget's clock stops. `resume` continues it."""
    _order("pause", study, home, json)


def stop(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """End a search after its running task; the study is then complete."""
    _order("stop", study, home, json)


def cancel(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """End a search now. Confirmed candidates stay usable; the search cannot be resumed."""
    _order("cancel", study, home, json)


def resume(
    study: Study = None,
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.")] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Continue a paused or interrupted search in this terminal, with its stored settings."""
    from paretune.cli.commands.search import run_search
    from paretune.search.prepare.prepare import prepare
    from paretune.search.spec import Spec
    from paretune.search.study.store import Store

    folder = study_folder(study, home)
    store = Store.reader(folder)
    try:
        spec = Spec.model_validate(store.meta("spec"))
    finally:
        store.close()
    raise typer.Exit(run_search(prepare(spec, home.resolve(), address), home.resolve(), folder.name, address, json))


def _order(verb: Verb, study: str | None, home: Path, json: bool) -> None:
    from paretune.search.study.control import order

    folder = study_folder(study, home)
    told = order(folder, verb)
    if json:
        print_json({"study": folder.name, "verb": verb, "told": told})
    else:
        print_text(told)
