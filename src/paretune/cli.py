"""The command line. stdout carries data, stderr talk; heavy libraries are imported by the commands that need them.

Exit codes: 0 complete, 1 internal error, 2 usage or configuration, 3 the budget ended with usable results, 4 nothing
feasible, 5 environment (disk, memory, lock, package), 130 interrupted and resumable.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune import __version__
from paretune.console import Progress, front_table, handle, print_json, print_text, talk
from paretune.hardware_profiles.errors import ParetuneError, UsageError

if TYPE_CHECKING:
    from paretune.search.run import Plan, Ready
    from paretune.search.store import Store
    from paretune.search.view import StudyView

app = typer.Typer(
    name="paretune",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Joint search over student size, sparsity and precision of a trained language model, per hardware profile.",
)
hardware = typer.Typer(no_args_is_help=True, help="Target machines.")
app.add_typer(hardware, name="hardware")

Home = Annotated[
    Path, typer.Option("--home", envvar="PARETUNE_HOME", help="Where studies, caches and the MLflow database live.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Study = Annotated[str | None, typer.Argument(help="Study id; the latest one if left out.")]
HOME = Path("mlruns")


def main() -> None:
    """Entry point: runs a command and turns errors into one sentence and an exit code."""
    try:
        code = app(standalone_mode=False)  # typer hands an Exit's code back instead of raising it
        if isinstance(code, int) and code:
            sys.exit(code)
    except ParetuneError as error:
        talk.print(
            f"[red]error:[/red] {error.problem}\n[green]remedy:[/green] {error.remedy}"
            if error.remedy
            else f"[red]error:[/red] {error.problem}",
            soft_wrap=True,
        )
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        _usage_or_bug(error)


def _usage_or_bug(error: Exception) -> None:
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        if hasattr(error, "show"):
            error.show(sys.stderr)
        sys.exit(2)
    if isinstance(error, OSError) and error.errno in (28, 30):  # ENOSPC, EROFS
        talk.print(
            f"[red]error:[/red] {error.strerror}: {error.filename}\n[green]remedy:[/green] free the disk, then run the same command again: it goes on",
            soft_wrap=True,
        )
        sys.exit(5)
    if type(error).__module__.startswith("sqlalchemy") and type(error).__name__ == "OperationalError":
        reason = str(getattr(error, "orig", error))
        talk.print(f"[red]error:[/red] the study's database cannot be written: {reason}", soft_wrap=True)
        talk.print(
            "[green]remedy:[/green] free or mend the disk, then run the same command again: it goes on", soft_wrap=True
        )
        sys.exit(5)
    talk.print_exception()
    talk.print("[red]this is a bug in paretune[/red]; the study, if one ran, can be continued with the same command")
    sys.exit(1)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Joint search over student size, sparsity and precision of a trained language model, per hardware profile."""
    if version:
        print_text(__version__)
        raise typer.Exit


@app.command()
def search(
    spec_file: Annotated[
        Path | None, typer.Argument(metavar="SPEC.yaml", help="Settings; options override them.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="quick (9 minutes) or overnight (8 hours).")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="stdlib-coder or a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your text: .txt, .jsonl or a folder of text files.")] = None,
    field: Annotated[str | None, typer.Option(help="Text field of a .jsonl file.")] = None,
    profile: Annotated[str | None, typer.Option(help="Target machine: a name or a YAML file.")] = None,
    budget: Annotated[str | None, typer.Option(help="Wall-clock time such as 45m or 8h; a promise.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, nsga2 or sequential.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    study: Annotated[
        str | None, typer.Option(help="Name of the study; the same settings continue an unfinished one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost and stop.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; a local one is started if left out.")
    ] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Search, or continue an interrupted search: the same command goes on where it stopped."""
    from paretune.search.run import prepare
    from paretune.search.spec import make_spec

    options = {
        "teacher": teacher,
        "data": data,
        "field": field,
        "profile": profile,
        "budget": budget,
        "sampler": sampler,
        "seed": seed,
    }
    spec = make_spec(spec_file, preset, options)
    ready = prepare(spec, home.resolve())
    if dry_run:
        _show_plan(ready.plan, json)
        return
    code = _run(ready, home.resolve(), study, address, json)
    raise typer.Exit(code)


def _run(ready: Ready, home: Path, wanted: str | None, address: str | None, json: bool) -> int:
    from paretune.search.run import create_study, find_study, run_study
    from paretune.search.store import Store
    from paretune.search.view import load_view
    from paretune.tracking.housekeeper import Housekeeper

    name, exists = find_study(home, ready, wanted)
    command = "paretune " + shlex.join(sys.argv[1:])
    store = Store.open_study(home / "studies" / name) if exists else create_study(ready, home, name, command)
    talk.print(
        f"study [bold]{name}[/bold]{' (continued)' if exists else ''}: {ready.teacher.name}, {ready.teacher.parameters / 1e6:.1f}M parameters, "
        f"{ready.plan.space_size:,} candidates, profile {ready.profile.name}, budget {ready.spec.budget}"
    )
    for note in ready.plan.notes:
        talk.print(f"[yellow]note:[/yellow] {note}", soft_wrap=True)
    keeper = Housekeeper(store, home)
    with Progress(ready.spec.budget_s, float(store.meta("spent_s", 0.0) or 0.0)) as progress:
        before = load_view(store)
        progress.explored, progress.confirmed = len(before.rung0), len(before.confirmed)

        def notify(kind: str, data: dict[str, Any]) -> None:
            handle(progress, kind, data)
            if kind == "confirmed" and data["status"] == "complete":
                keeper.tidy()
                progress.saw_confirmation(load_view(store), data["key"])

        try:
            code = run_study(store, ready, home, notify, address)
        finally:
            left = keeper.finish()
    _show_end(load_view(store), home, code, left, json)
    store.close()
    return code


def _show_end(view: StudyView, home: Path, code: int, left: str | None, json: bool) -> None:
    from paretune.hardware_profiles.errors import NothingFeasible
    from paretune.search.recommend import Limits, recommend

    if view.front:
        talk.print(front_table(view, f"{view.study}: the front"))
    with contextlib.suppress(NothingFeasible):
        found = recommend(view, Limits())
        talk.print(f"[bold]recommended: {found.chosen.name}[/bold] ({found.chosen.key[:8]})")
        for sentence in found.why:
            talk.print(f"  · {sentence}", soft_wrap=True)
        artifact = view.folder / "artifacts" / found.chosen.key
        talk.print(f'  {_program()} generate {_short(artifact)} --prompt "def "', soft_wrap=True, markup=False)
    talk.print(f"report: {_short(view.folder / 'report.html')}   MLflow: {_program()} ui", soft_wrap=True)
    if left:
        talk.print(f"[yellow]note:[/yellow] {left}", soft_wrap=True)
    if code == 3:
        talk.print(
            "[yellow]the budget ended before a finalist was confirmed[/yellow]: the baselines are usable; a longer --budget finds students"
        )
    if code == 130:
        talk.print("interrupted; the same command goes on")
    if json:
        print_json(_status(view))
    else:
        print_text(str(_short(view.folder / "report.html")))


@app.command()
def status(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """How a study stands."""
    with _view(study, home) as view:
        data = _status(view)
        if json:
            print_json(data)
            return
        talk.print(
            f"[bold]{view.study}[/bold]: {data['state']}, {data['spent_s']:.0f} of {data['budget_s']:.0f} s used"
        )
        print_text(
            f"{data['explored']} explored, {data['confirmed']} confirmed, front {data['front']} ({data['ties']} ties), {data['failures']} failures"
        )
        for event in view.events[-8:]:
            talk.print(f"  [dim]{event.at[:19]}[/dim] {event.text}", soft_wrap=True)


@app.command()
def front(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """The Pareto front of a study: confirmed candidates only."""
    from rich.console import Console

    from paretune.search.recommend import point_dict

    with _view(study, home) as view:
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
            Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(front_table(view, view.study))


@app.command()
def recommend(
    study: Study = None,
    max_latency: Annotated[float | None, typer.Option(help="Decode milliseconds per token.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Compressed artifact size such as 3MB.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Peak memory of the engine such as 40MB.")] = None,
    max_loss: Annotated[str | None, typer.Option(help="NLL increase over the fp32 teacher such as 1%.")] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """One candidate for your limits, with reasons and the runner-up's price."""
    from paretune.search.recommend import Limits
    from paretune.search.recommend import recommend as decide

    limits = Limits(
        max_latency, _bytes(max_size, "--max-size"), _bytes(max_memory, "--max-memory"), _fraction(max_loss)
    )
    with _view(study, home) as view:
        found = decide(view, limits)
        artifact = view.folder / "artifacts" / found.chosen.key
        if json:
            print_json({**found.to_dict(), "study": view.study, "artifact": str(artifact)})
            return
        print_text(f"{found.chosen.name} ({found.chosen.key})\n{found.chosen.description}")
        for sentence in found.why:
            print_text(f"- {sentence}")
        if found.runner_up is not None:
            print_text(f"- runner-up: {found.price}")
        print_text(f"artifact: {_short(artifact)}")


@app.command()
def report(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Write report.html and front.png of a study anew."""
    from paretune.tracking.report import write_report

    with _view(study, home) as view:
        write_report(view)
        paths = {"report": str(view.folder / "report.html"), "picture": str(view.folder / "front.png")}
        if json:
            print_json(paths)
        else:
            print_text(paths["report"])


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 1,
    json: Json = False,
) -> None:
    """Stream text from an artifact through onnxruntime-genai and say how fast."""
    from paretune.engines.generate import stream

    with contextlib.closing(stream(artifact, prompt, max_tokens, temperature, threads)) as pieces:
        text = ""
        if not json:
            sys.stdout.write(prompt)
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                if not json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                continue
            if json:
                print_json({"prompt": prompt, "text": text, **piece.__dict__})
            else:
                print_text("")
                talk.print(
                    f"{piece.tokens} tokens, {piece.tokens_per_second:.0f} tokens/s, first token after {piece.ttft_ms:.1f} ms, {threads} thread(s)"
                )


@app.command()
def measure(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    profile: Annotated[str, typer.Option(help="Target machine: a name or a YAML file.")] = "local-cpu",
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Measure an artifact again by the lane and say whether it agrees with its study."""
    from paretune.search.remeasure import remeasure

    found = remeasure(artifact, profile, home.resolve())
    if json:
        print_json(found.to_dict())
    else:
        for line in found.lines():
            print_text(line)


@app.command()
def ui(
    home: Home = HOME, port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000
) -> None:
    """Open the MLflow UI on this home: one worker, loopback only."""
    from paretune.tracking.ui import serve_ui

    raise typer.Exit(serve_ui(home.resolve(), port))


@app.command()
def sync(study: Study = None, home: Home = HOME, json: Json = False) -> None:
    """Rebuild a study's runs in MLflow from its store."""
    from paretune.tracking.mlflow_sink import rebuild

    folder = _folder(study, home)
    number = rebuild(home.resolve(), folder)
    if json:
        print_json({"study": folder.name, "synced": number})
    else:
        print_text(f"{number} runs of {folder.name} are in MLflow")


@hardware.command("list")
def hardware_list(home: Home = HOME, json: Json = False) -> None:
    """Names of the profiles at hand."""
    from paretune.hardware_profiles.profile import profile_names

    names = profile_names(home.resolve())
    print_json(names) if json else print_text("\n".join(names))


@hardware.command("show")
def hardware_show(
    name: Annotated[str, typer.Argument(help="Name or YAML file.")] = "local-cpu", home: Home = HOME, json: Json = False
) -> None:
    """A profile as YAML."""
    from paretune.hardware_profiles.profile import load_profile
    from paretune.hardware_profiles.yaml_file import dump_model

    found = load_profile(name, home.resolve())
    print_json(found.model_dump(mode="json")) if json else print_text(
        dump_model(found, f"profile {found.name}").rstrip()
    )


@hardware.command("detect")
def hardware_detect(home: Home = HOME, json: Json = False) -> None:
    """Detect this machine and write its profile anew."""
    from paretune.hardware_profiles.profile import LOCAL, local_profile

    (home.resolve() / "profiles" / f"{LOCAL}.yaml").unlink(missing_ok=True)
    found = local_profile(home.resolve())
    print_json(found.model_dump(mode="json")) if json else print_text(str(home / "profiles" / f"{LOCAL}.yaml"))


def _status(view: StudyView) -> dict[str, Any]:
    meta = view.meta
    return {
        "study": view.study,
        "state": meta["state"],
        "spent_s": meta["spent_s"] or 0.0,
        "budget_s": meta["budget_s"],
        "explored": len(view.rung0),
        "confirmed": len(view.confirmed),
        "front": len(view.front),
        "ties": len(view.ties),
        "failures": len(view.failures),
        "seconds_by_stage": view.seconds_by_stage,
        "calibration": meta["calibration"],
        "latency_fit": meta["fit_error"],
        "folder": str(view.folder),
    }


def _show_plan(plan: Plan, json: bool) -> None:
    if json:
        print_json(plan.__dict__)
        return
    print_text(
        f"{plan.teacher}: {plan.parameters / 1e6:.1f}M parameters, {plan.space_size:,} candidates for {plan.profile}"
    )
    print_text(f"text: {', '.join(f'{name} {n:,}' for name, n in plan.text.items())} characters")
    print_text(f"budget {plan.budget_s:.0f} s: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in plan.seconds.items()))
    print_text(
        f"about {plan.expected_candidates} candidates explored, up to {plan.expected_finalists} finalists recovered and confirmed"
    )
    print_text(
        f"disk about {plan.disk_bytes / 1e9:.1f} GB ({plan.free_disk_bytes / 1e9:.0f} GB free), memory about {plan.memory_bytes / 1e9:.1f} GB "
        f"({plan.free_memory_bytes / 1e9:.0f} GB free)"
    )
    for note in plan.notes:
        talk.print(f"[yellow]note:[/yellow] {note}", soft_wrap=True)


@contextlib.contextmanager
def _view(study: str | None, home: Path) -> Iterator[StudyView]:
    from paretune.search.view import load_view

    store = _reader(_folder(study, home))
    try:
        yield load_view(store)
    finally:
        store.close()


def _reader(folder: Path) -> Store:
    from paretune.search.store import Store

    return Store.reader(folder)


def _folder(study: str | None, home: Path) -> Path:
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


def _program() -> str:
    """How this shell would call us again."""
    return "paretune" if shutil.which("paretune") else str(_short(Path(sys.argv[0]).absolute()))


def _bytes(text: str | None, option: str) -> float | None:
    """Bytes of a size such as 3MB, 800kB or 12000000."""
    if text is None:
        return None
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0, "": 1.0}
    number = text.strip().lower().rstrip("kmgb")
    with contextlib.suppress(ValueError, KeyError):
        return float(number) * units[text.strip().lower()[len(number) :]]
    raise UsageError(f"{option} must be a size such as 3MB, but got {text!r}", "write a number and kB, MB or GB")


def _fraction(text: str | None) -> float | None:
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    raise UsageError(f"--max-loss must be like 1% or 0.01, but got {text!r}", "write a percentage")


def _short(path: Path) -> Path:
    """Relative to the working directory where that is shorter."""
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
