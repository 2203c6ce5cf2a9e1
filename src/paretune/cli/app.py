"""The command line. stdout carries data, stderr talk; heavy libraries are imported by the commands that need them.

Exit codes: 0 complete, 1 internal error, 2 usage or configuration, 3 the budget ended with usable results, 4 nothing
feasible, 5 environment (disk, memory, lock, package), 130 interrupted and resumable.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import typer

from paretune.cli.commands.agent import agent
from paretune.cli.commands.artifact import generate, measure
from paretune.cli.commands.control import cancel, pause, resume, stop
from paretune.cli.commands.hardware import hardware
from paretune.cli.commands.op_profile import op_profile
from paretune.cli.commands.score import score
from paretune.cli.commands.search import search
from paretune.cli.commands.serve import serve
from paretune.cli.commands.study import front, recommend, status
from paretune.cli.commands.targets import targets
from paretune.cli.commands.tracking import report, sync, ui
from paretune.cli.terminal.console import print_text, say, show_all_characters, talk, tell_problem
from paretune.common.command_line import home_now
from paretune.common.errors import ParetuneError, RenamedSetting
from paretune.common.file_access import path_problem
from paretune.common.files import disk_problem
from paretune.common.version import VERSION
from paretune.search.execution import ending

app = typer.Typer(
    name="paretune",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Joint search over student size, sparsity and precision of a trained language model, per hardware profile.",
)
MOST_CAUSES = 10
COMMANDS: tuple[Callable[..., None], ...] = (search, status, front, recommend, targets, report, generate, measure)
COMMANDS += (pause, resume, stop, cancel, serve, score, agent, ui, sync)
for command in COMMANDS:
    app.command()(command)
app.add_typer(hardware, name="hardware")
app.command()(op_profile)
app.command("profile", hidden=True)(op_profile)  # its name before hardware profiles were the only profiles


def main() -> None:
    """Entry point: runs a command and turns errors into one sentence and an exit code."""
    ending.take()
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
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is RenamedSetting:
            say(f"note: {message}")
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show


def _refuse(error: ParetuneError) -> NoReturn:
    """One sentence, the remedy, and the exit code."""
    ending.tell(error)
    with contextlib.suppress(OSError):  # where the terminal is a log on a full disk
        tell_problem(error.problem, error.remedy)
    sys.exit(error.exit_code)


def _usage_or_bug(error: Exception) -> None:
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        if hasattr(error, "show"):
            error.show(sys.stderr)
        sys.exit(2)
    for cause in _causes(error):
        problem = _known_problem(cause)
        if problem is not None:
            _refuse(problem)
    talk.print_exception()
    say(("this is a bug in paretune", "red"), "; the study, if one ran, can be continued with the same command")
    sys.exit(1)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: libraries wrap a full disk in errors of their own."""
    for _ in range(MOST_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _known_problem(error: BaseException) -> ParetuneError | None:
    if isinstance(error, ParetuneError):
        return error
    if isinstance(error, OSError):
        return disk_problem(error) or path_problem(error)
    if type(error).__module__.startswith("sqlalchemy") and type(error).__name__ in (
        "OperationalError",
        "DatabaseError",
    ):
        from paretune.search.study.database_errors import database_problem

        return database_problem(error, home_now(), "the study database")  # type: ignore[arg-type]
    return None


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Joint search over student size, sparsity and precision of a trained language model, per hardware profile."""
    if version:
        print_text(VERSION)
        raise typer.Exit
