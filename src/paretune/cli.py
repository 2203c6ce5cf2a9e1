"""The command line. stdout carries data, stderr talk; heavy libraries are imported by the commands that need them.

Exit codes: 0 complete, 1 internal error, 2 usage or configuration, 3 the budget ended with usable results, 4 nothing
feasible, 5 environment (disk, memory, lock, package), 130 interrupted and resumable.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from paretune import __version__
from paretune.cli_agent import agent
from paretune.cli_artifact import generate, measure
from paretune.cli_control import cancel, pause, resume, stop
from paretune.cli_hardware import hardware
from paretune.cli_profile import profile
from paretune.cli_score import score
from paretune.cli_search import search
from paretune.cli_serve import serve
from paretune.cli_study import front, recommend, status
from paretune.cli_targets import targets
from paretune.cli_tracking import report, sync, ui
from paretune.console import print_text, say, show_all_characters, talk, tell_problem
from paretune.hardware_profiles.access import path_problem
from paretune.hardware_profiles.errors import EnvironmentProblem, ParetuneError
from paretune.hardware_profiles.files import disk_problem

app = typer.Typer(
    name="paretune",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Joint search over student size, sparsity and precision of a trained language model, per hardware profile.",
)
COMMANDS: tuple[Callable[..., None], ...] = (search, status, front, recommend, targets, report, generate, measure)
COMMANDS += (pause, resume, stop, cancel, serve, score, agent, ui, sync)
for command in COMMANDS:
    app.command()(command)
app.add_typer(hardware, name="hardware")
app.command()(profile)


def main() -> None:
    """Entry point: runs a command and turns errors into one sentence and an exit code."""
    show_all_characters()
    _let_warnings_be_warnings()
    try:
        code = app(standalone_mode=False)  # typer hands an Exit's code back instead of raising it
        if isinstance(code, int) and code:
            sys.exit(code)
    except ParetuneError as error:
        _refuse(error)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        _usage_or_bug(error)


def _let_warnings_be_warnings() -> None:
    """PYTHONWARNINGS=error makes an error of the first deprecated call in any library; it is for those who develop them."""
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.filters[:] = [f for f in warnings.filters if f[0] != "error"]  # type: ignore[index]


def _refuse(error: ParetuneError) -> NoReturn:
    """One sentence, the remedy, and the exit code."""
    tell_problem(error.problem, error.remedy)
    sys.exit(error.exit_code)


def _usage_or_bug(error: Exception) -> None:
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        if hasattr(error, "show"):
            error.show(sys.stderr)
        sys.exit(2)
    if isinstance(error, OSError) and (problem := disk_problem(error) or path_problem(error)) is not None:
        _refuse(problem)
    if type(error).__module__.startswith("sqlalchemy") and type(error).__name__ == "OperationalError":
        reason = str(getattr(error, "orig", error))
        remedy = "mount the disk writable" if "readonly" in reason else "free or mend the disk"
        _refuse(
            EnvironmentProblem(
                f"the study's database cannot be written: {reason}",
                f"{remedy}, then run the same command again: it goes on",
            )
        )
    talk.print_exception()
    say(("this is a bug in paretune", "red"), "; the study, if one ran, can be continued with the same command")
    sys.exit(1)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Joint search over student size, sparsity and precision of a trained language model, per hardware profile."""
    if version:
        print_text(__version__)
        raise typer.Exit
