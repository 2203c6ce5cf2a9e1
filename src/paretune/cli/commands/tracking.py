"""The commands that show a study in a report or in MLflow."""

from __future__ import annotations

from typing import Annotated

import typer

from paretune.cli.terminal.console import print_json, print_text
from paretune.cli.terminal.options import HOME, Home, Json, Study, opened_view, study_folder


def report(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Write report.html and front.png of a study again."""
    from paretune.tracking.report.report import write_report

    with opened_view(study, home) as view:
        write_report(view)
        paths = {"report": str(view.folder / "report.html"), "picture": str(view.folder / "front.png")}
        if json:
            print_json(paths)
        else:
            print_text(paths["report"])


def ui(
    home: Home = HOME,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 5000,
) -> None:
    """Serve the MLflow UI of this home, read-only and on loopback only, and print a link that opens once."""
    from paretune.service.server.mlflow_ui import serve_ui

    raise typer.Exit(serve_ui(home.resolve(), port))


def sync(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Rebuild a study's runs in MLflow from its store."""
    from paretune.tracking.mlflow.sink import rebuild

    folder = study_folder(study, home)
    number = rebuild(home.resolve(), folder)
    if json:
        print_json({"study": folder.name, "synced": number})
    else:
        print_text(f"{number} runs of {folder.name} are in MLflow")
