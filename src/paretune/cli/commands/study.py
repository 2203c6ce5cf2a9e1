"""The commands that read a study: how it stands, its front, the one to take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.terminal.console import front_table, print_json, print_text, say, screen, tell_problem
from paretune.cli.terminal.options import (
    HOME,
    Home,
    Json,
    Study,
    complete_profile,
    complete_words,
    fraction,
    milliseconds,
    opened_view,
    positive,
    size_in_bytes,
)
from paretune.common.command_line import short
from paretune.common.errors import NothingFeasible

if TYPE_CHECKING:
    from paretune.search.recommend.advice import Advice
    from paretune.search.study.view import StudyView


def status(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Show the state of a study."""
    with opened_view(study, home) as view:
        data = status_of(view)
        if json:
            print_json(data)
            return
        say((view.study, "bold"), f": {data['state']}, {data['spent_s']:.0f} of {data['budget_s']:.0f} s used")
        print_text(
            f"{data['explored']} explored, {data['confirmed']} confirmed, "
            f"front {data['front']} ({data['ties']} ties), {data['failures']} failures"
        )
        for task in data["doing"]:
            say("  ", (task["stage"], "bold"), f": {task['candidate']}" if task["candidate"] else "")
        for event in view.events[-8:]:
            say("  ", (event.at[:19], "dim"), f" {event.text}")


def front(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Show the Pareto front of a study; only confirmed candidates can be on it."""
    from paretune.search.recommend.recommend import point_dict, why_empty

    with opened_view(study, home) as view:
        if json:
            print_json(
                {
                    "study": view.study,
                    "objectives": view.objectives,
                    "ties": view.ties,
                    "front": [point_dict(p) for p in view.front],
                }
            )
        else:
            screen().print(front_table(view, view.study))
            if not view.front:
                say(why_empty(view).problem)


def recommend(
    study: Study = None,
    max_latency: Annotated[
        float | None, typer.Option(help="Decode milliseconds per token; of a plug-in, per forward.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Compressed artifact size such as 3MB.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Peak memory of the engine such as 40MB.")] = None,
    max_loss: Annotated[
        str | None, typer.Option(help="Increase of the NLL (or a plug-in's quality) over the fp32 teacher such as 1%.")
    ] = None,
    min_throughput: Annotated[float | None, typer.Option(help="Tokens per second of one stream, at least.")] = None,
    max_energy: Annotated[float | None, typer.Option(help="Joules per token; needs the target's power.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="US dollars per million tokens; needs the target's price.")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            help="balanced, fastest, quality or smallest; default: what the limits suggest.",
            autocompletion=complete_words("balanced", "fastest", "quality", "smallest"),
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Recommend for this target, with the study's costs or with predictions.",
            autocompletion=complete_profile,
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the artifact with HOW_TO_RUN.md into this new folder.")
    ] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Recommend one candidate within your limits, with reasons, the runner-up, and what looser limits would buy."""
    from paretune.search.recommend.advice import advise
    from paretune.search.recommend.export import export_artifact
    from paretune.search.recommend.recommend import Limits

    limits = Limits(
        milliseconds(max_latency, "--max-latency"),
        size_in_bytes(max_size, "--max-size"),
        size_in_bytes(max_memory, "--max-memory"),
        fraction(max_loss, "--max-loss"),
        positive(min_throughput, "--min-throughput", "tokens per second such as 200"),
        positive(max_energy, "--max-energy", "joules per token such as 0.05"),
        positive(max_cost, "--max-cost", "US dollars such as 0.2"),
    )
    with opened_view(study, home) as view:
        found = advise(view, limits, goal, profile, home.resolve())
        delivered = None
        if export is not None and found.chosen is not None:
            delivered = export_artifact(view, found.chosen, export)
        if json:
            print_json({**found.to_dict(), "exported": None if delivered is None else str(delivered)})
        else:
            _tell(found, view.folder, delivered)
        if found.chosen is None:
            raise typer.Exit(NothingFeasible.exit_code)


def _tell(found: Advice, folder: Path, delivered: Path | None) -> None:
    """An advice in words: the answer on stdout, and what cannot be met on stderr."""
    if found.chosen is None:
        assert found.nearest is not None
        near = f"{found.nearest.name} ({found.nearest.key[:8]})"
        buys = [f"{r.limit} 10 % looser: {r.gain}" for r in found.relaxed if r.key is not None]
        tell_problem(
            f"no front member meets all limits; the nearest is {near}: {'; '.join(found.why)}",
            f"relax a limit{''.join(f'; {b}' for b in buys)}",
        )
        return
    print_text(f"{found.chosen.name} ({found.chosen.key})\n{found.chosen.description}")
    for sentence in found.why:
        print_text(f"- {sentence}")
    if found.ties:
        print_text(f"- tied with it in every objective: {', '.join(key[:8] for key in found.ties)}")
    if found.runner_up is not None:
        print_text(f"- runner-up: {found.price}")
    for relaxed in found.relaxed:
        print_text(f"- {relaxed.limit} 10 % looser would buy {relaxed.gain}")
    print_text(f"artifact: {short(folder / 'artifacts' / found.chosen.key)}")
    if delivered is not None:
        print_text(f"exported: {short(delivered)}, how to run it: {short(delivered / 'HOW_TO_RUN.md')}")


def status_of(view: StudyView) -> dict[str, Any]:
    """How a study stands, as JSON-able data."""
    from paretune.search.study.view import standing

    meta = view.meta
    return {
        "study": view.study,
        "state": meta["state"],
        **standing(view),
        "calibration": meta["calibration"],
        "latency_fit": meta["fit_error"],
        "folder": str(view.folder),
    }
