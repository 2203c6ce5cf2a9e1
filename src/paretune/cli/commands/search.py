"""The command that searches."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.commands.study import status_of
from paretune.cli.commands.targets import show_targets
from paretune.cli.terminal.console import (
    Progress,
    front_table,
    handle,
    note,
    print_json,
    print_text,
    say,
    talk,
    tell_problem,
)
from paretune.cli.terminal.options import HOME, Home, Json, complete_profile, complete_words, fraction
from paretune.common.command_line import pasted, short
from paretune.common.errors import NothingFeasible

if TYPE_CHECKING:
    from collections.abc import Callable

    from paretune.search.prepare.plan import Plan
    from paretune.search.prepare.ready import Ready
    from paretune.search.study.view import StudyView
    from paretune.service.notify.notify import Notify

BUDGET_ENDED, INTERRUPTED = 3, 130
MOST_FAILURES_TOLD = 3
OUT_OF_TIME = 0.5  # of the budget; a measurement that no longer fits is not begun


def search(
    spec_file: Annotated[
        Path | None, typer.Argument(metavar="SPEC.yaml", readable=False, help="Settings; options override them.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quick (9 minutes) or overnight (8 hours).", autocompletion=complete_words("quick", "overnight")
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="stdlib-coder, a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, GPT-2), or plugin:NAME (plugin:MODULE:CLASS)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Your text: a text file, records (.jsonl, .json, .csv, .tsv, .parquet) or a folder of them."),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Text field of records; keys joined by dots for a nested one.")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Target: a name or a YAML file. Repeat it for further targets; the search optimizes for the first.",
            autocompletion=complete_profile,
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall-clock time such as 45m or 8h; the front is complete when it ends.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="tpe, nsga2 or sequential.", autocompletion=complete_words("tpe", "nsga2", "sequential")),
    ] = None,
    qat_threshold: Annotated[
        str | None,
        typer.Option(
            "--qat-threshold",
            "--max-loss",
            help="Train 4-bit finalists under their rounding (QAT) only where rounding alone loses more, such as 1%.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None,
    study: Annotated[
        str | None, typer.Option(help="Name of the study; the same settings continue an unfinished one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many tasks run at once; it may change when a study is continued.")
    ] = None,
    threads_per_trial: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each task; by default the cores are divided among the workers."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it costs, then stop.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; without it, a local one is started.")
    ] = None,
    notify_command: Annotated[
        str | None,
        typer.Option(help="Program to run when the search ends or dies; it reads the event from standard input."),
    ] = None,
    notify_url: Annotated[
        str | None, typer.Option(help="https address to notify when the search ends or dies.")
    ] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Start a search, or continue an interrupted one with the same command."""
    from paretune.search.prepare.prepare import prepare
    from paretune.search.spec import make_spec
    from paretune.service.notify.notify import load_notify

    options = {
        "teacher": teacher,
        "data": data,
        "field": field,
        "profile": profile[0] if profile else None,
        "targets": tuple(profile[1:]) if profile and len(profile) > 1 else None,
        "budget": budget,
        "sampler": sampler,
        "qat_threshold": fraction(qat_threshold, "--qat-threshold"),
        "seed": seed,
        "workers": workers,
        "threads_per_trial": threads_per_trial,
    }
    spec = make_spec(spec_file, preset, options)
    notify = load_notify(home.resolve(), notify_command, notify_url)
    ready = prepare(spec, home.resolve(), address)
    if dry_run:
        _show_plan(ready.plan, json)
        return
    code = run_search(
        ready, home.resolve(), study, address, json, whom=notify, command=shlex.join(["paretune", *sys.argv[1:]])
    )
    raise typer.Exit(code)


def run_search(
    ready: Ready,
    home: Path,
    wanted: str | None,
    address: str | None,
    json: bool,
    tell: Callable[[str], None] = lambda _study: None,
    output: bool = True,
    whom: Notify | None = None,
    command: str = "",
) -> int:
    """Start or continue the study, show its progress and its end; returns the exit code. `tell` is given the study's id as soon as it
    is known; without `output` nothing is written on stdout; `whom` is told of the end, None: what the home says; `command` starts
    the same search again, for the report."""
    from paretune.search.execution.cluster import require_cluster
    from paretune.search.execution.finish_targets import finish_targets
    from paretune.search.execution.run import run_study
    from paretune.search.prepare.studies import create_study, find_study
    from paretune.search.study.store import Store
    from paretune.search.study.view import load_view
    from paretune.service.notify.notify import load_notify
    from paretune.service.notify.watch import watched
    from paretune.tracking.mlflow.housekeeper import Housekeeper

    if address is not None:
        require_cluster(address)
    name, exists = find_study(home, ready, wanted)
    tell(name)
    store = Store.open_study(home / "studies" / name) if exists else create_study(ready, home, name, command)
    say(
        "study ",
        (name, "bold"),
        f"{' (continued)' if exists else ''}: {ready.teacher.name}, {ready.teacher.parameters / 1e6:.1f}M parameters, "
        f"{ready.plan.space_size:,} candidates, "
        f"target{'s' if ready.targets else ''} {', '.join(p.name for p in (ready.profile, *ready.targets))}, budget {ready.spec.budget}",
    )
    for told in store.meta("notes", []):
        note(told)
    keeper = Housekeeper(store, home)
    known = float(store.meta("spent_s", 0.0) or 0.0)
    with (
        watched(whom or load_notify(home), name, store.folder) as watch,
        Progress(ready.spec.budget_s, known) as progress,
    ):
        before = load_view(store)
        progress.explored, progress.confirmed = len(before.rung0), len(before.confirmed)

        def notify(kind: str, data: dict[str, Any]) -> None:
            handle(progress, kind, data)
            if kind == "confirmed" and data["status"] == "complete":
                keeper.tidy()
                progress.saw_confirmation(load_view(store), data["key"])

        try:
            code = run_study(store, ready, home, notify, address)
            problem = finish_targets(store, ready, home) if code in (0, 3) else None
            if problem:
                note(problem)
        finally:
            left = keeper.finish()
    view = load_view(store)
    show_targets(view)
    _show_end(view, home, code, left)
    for problem in watch.ended(end_of(view, code)):
        note(problem)
    if json:
        print_json({**status_of(view), **outcome_of(view, code)})
    elif output:
        print_text(str(short(view.folder / "report.html")))
    store.close()
    return code


def outcome_of(view: StudyView, code: int) -> dict[str, Any]:
    """The exit code of a search with its reason and remedy, as JSON-able data; empty words after a good end."""
    reason, remedy = ("", "") if code in (0, INTERRUPTED) else why_ended(view, code)
    return {"exit_code": code, "reason": reason, "remedy": remedy}


def end_of(view: StudyView, code: int) -> dict[str, Any]:
    """What a notification says of a search's end."""
    from paretune.tracking.wording import recommended

    best = recommended(view)
    return {
        "event": "ended",
        "state": view.meta["state"],
        "exit_code": code,
        "confirmed": len(view.confirmed),
        "front": len(view.front) - len(view.ties),
        "recommended": None
        if best is None
        else {"key": best.chosen.key, "name": best.chosen.name, "why": list(best.why)},
    }


def _show_end(view: StudyView, home: Path, code: int, left: str | None) -> None:
    from paretune.search.recommend.recommend import Limits, recommend

    if view.front:
        talk.print(front_table(view, f"{view.study}: the front"))
    try:
        found = recommend(view, Limits())
    except NothingFeasible as error:
        if view.confirmed:
            note(f"{error.problem}; {error.remedy}")
    else:
        say((f"recommended: {found.chosen.name}", "bold"), f" ({found.chosen.key[:8]})")
        for sentence in found.why:
            say(f"  · {sentence}")
        artifact = view.folder / "artifacts" / found.chosen.key
        if view.figures.is_decoder:
            say(f"  {pasted('generate', short(artifact), '--prompt', 'def ')}")
    say(f"report: {short(view.folder / 'report.html')}   MLflow: {pasted('ui', home=home)}")
    if left:
        note(left)
    if code == INTERRUPTED:
        state = str(view.meta["state"])
        say(
            state
            if state == "cancelled"
            else f"{state}; continue it with the same command, or with `{pasted('resume', view.study, home=home)}`"
        )
    elif code:
        tell_problem(*why_ended(view, code))


def why_ended(view: StudyView, code: int) -> tuple[str, str]:
    """(reason, remedy) of a search that ended with `code` other than 0 and 130."""
    from paretune.search.study.view import failure_counts

    reason, remedy = str(view.meta["ended"] or _out_of_time(view)), str(view.meta["remedy"] or "")
    if code == BUDGET_ENDED:
        return (
            "the budget ended before a finalist was confirmed",
            "the baselines are usable; a longer --budget finds students",
        )
    if code == NothingFeasible.exit_code and not remedy:
        counts = [f"{text} ({number} times)" for text, number in failure_counts(view).most_common(MOST_FAILURES_TOLD)]
        reason = f"nothing was confirmed: {'; '.join([reason, *counts])}"
        remedy = f"see {short(view.folder / 'worker.log')}; the same command continues this study, a larger --budget starts a new one"
    return reason, remedy or "fix that, then run the same command again to continue"


def _out_of_time(view: StudyView) -> str:
    """The reason for a search that ended without one: on a slow or busy machine no time is left for the first measurement."""
    spent, budget = float(view.meta["spent_s"]), float(view.meta["budget_s"])
    if spent < OUT_OF_TIME * budget:
        return "no reason is known"
    return (
        f"{spent:.0f} of {budget:.0f} s were used before the first baseline could be measured: the machine is slow, or busy with "
        "other work"
    )


def _show_plan(plan: Plan, json: bool) -> None:
    if json:
        print_json(plan.__dict__)
        return
    print_text(
        f"{plan.teacher}: {plan.parameters / 1e6:.1f}M parameters, {plan.space_size:,} candidates for {plan.profile}"
    )
    print_text(f"{plan.text_what}: {', '.join(f'{name} {n:,}' for name, n in plan.text.items())} {plan.text_unit}")
    for line in plan.read:
        print_text(f"  {line}")
    print_text(f"budget {plan.budget_s:.0f} s: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in plan.seconds.items()))
    print_text(plan.layout)
    print_text(
        f"about {plan.expected_candidates} candidates explored; time to recover and confirm "
        f"{plan.expected_finalists} finalists, or up to {plan.most_finalists} if each takes less"
    )
    if "elastic student" in plan.seconds:
        sizes = (
            "mild cuts only, at least three quarters of every width"
            if plan.mild
            else "all sizes down to a quarter of the widths"
        )
        print_text(
            f"elastic student: {plan.tokens_per_parameter:.2g} training tokens per parameter are affordable, so {sizes}"
        )
    print_text(
        f"disk about {plan.disk_bytes / 1e9:.1f} GB ({plan.free_disk_bytes / 1e9:.0f} GB free), "
        f"memory about {plan.memory_bytes / 1e9:.1f} GB ({plan.free_memory_bytes / 1e9:.0f} GB free)"
    )
    for told in plan.notes:
        note(told)
