"""Every command line that is printed anywhere can be pasted: it is quoted, names its home, and the program takes it."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import typer

from paretune.cli import app as cli
from paretune.common import command_line
from paretune.common.command_line import pasted, use_home

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [
    "compression",
    "engines",
    "hardware_profiles",
    "objectives",
    "search",
    "service",
    "spaces",
    "teachers",
    "tracking",
]
SOURCES = [*(ROOT / "src" / "paretune").glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]
TEMPLATES = sorted((ROOT / "service" / "templates").glob("*.html"))
NASTY = "my runs [best] $HOME 'q' \"d\" `id`; é"


def parse(line: str) -> None:
    """Parse a command line without running it. Raises click's usage errors."""
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("paretune", [], resilient_parsing=True)
    while hasattr(command, "commands"):
        assert words, f"no command: {line}"
        inner = command.get_command(context, words[0])
        assert inner is not None, f"there is no command {words[0]!r}: {line}"
        command, words = inner, words[1:]
        if hasattr(command, "commands") and not words:
            return
        context = command.make_context(
            command.name, list(words), parent=context, resilient_parsing=hasattr(command, "commands")
        )


def words_of(node: ast.AST) -> str:
    """A string of the source with NAME for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "NAME" for v in node.values)
    return "NAME"


def called_with(call: ast.Call) -> str:
    words = [("NAME" if isinstance(a, ast.Starred) else words_of(a)) for a in call.args]
    if isinstance(call.args[-1], ast.Starred):
        words = words[:-1]
    return shlex.join(["paretune", *words])


def made_in(path: Path) -> Iterator[tuple[int, str]]:
    """The command lines that `pasted` makes in a source file."""
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "pasted"
            and node.args
        ):
            yield node.lineno, called_with(node)


def written_in(path: Path) -> Iterator[tuple[int, str]]:
    """The command lines that stand in backticks in a source file's texts, docstrings too."""
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and (
            isinstance(node, ast.JoinedStr) or isinstance(node.value, str)
        ):
            for line in re.findall(r"`(paretune [a-z][^`\n]*)`", words_of(node)):
                yield node.lineno, line


def told_outside_of_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text("utf8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            skipped.add(id(body[0].value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(v) for v in node.values}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in skipped:
            if isinstance(node, ast.Constant) and not isinstance(node.value, str):
                continue
            for line in re.findall(r"`(paretune [a-z][^`\n]*)`", words_of(node)):
                yield node.lineno, line


MADE = [(p.relative_to(ROOT), n, line) for p in SOURCES for n, line in made_in(p)]
# A docstring may name a command without its arguments.
WRITTEN = [(p.relative_to(ROOT), n, line) for p in SOURCES for n, line in written_in(p) if len(line.split()) > 2]
WRITTEN += [(p.relative_to(ROOT), n, line) for p in SOURCES for n, line in told_outside_of_docstrings(p)]
ON_PAGES = [
    (p.relative_to(ROOT), 0, re.sub(r"\{\{.*?\}\}", "NAME", unescape(line)))
    for p in TEMPLATES
    for line in re.findall(r"<code>(paretune [^<]*)</code>", p.read_text("utf8"))
]
# Names of a command, told where no line of it could be right for the reader, and lines that are run in a folder named beside them.
NAMED = {
    "paretune hardware calibrate",
    "paretune hardware detect",
    "paretune agent",
    "paretune search",
    "paretune serve",
    'paretune generate . --prompt "def "',
}


def test_there_are_such_lines() -> None:
    assert len(MADE) >= 12 and len(WRITTEN) >= 8 and ON_PAGES


@pytest.mark.parametrize(("path", "number", "line"), [*MADE, *WRITTEN, *ON_PAGES], ids=lambda v: str(v)[:60])
def test_the_program_takes_it(path: Path, number: int, line: str) -> None:
    parse(line)


def test_command_lines_in_messages_are_made_by_the_one_function() -> None:
    loose = [(p, n, line) for p in SOURCES for n, line in told_outside_of_docstrings(p) if line not in NAMED]
    assert not loose, "make them with command_line.pasted"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARETUNE_HOME", raising=False)
    monkeypatch.setattr(command_line, "_now", {})
    return tmp_path


def test_the_home_is_said_where_it_would_not_be_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, usual = elsewhere / NASTY, elsewhere / "mlruns"
    words = shlex.split(pasted("resume", "s", home=own))
    assert words[-4:] == ["resume", "s", "--home", str(own)]
    assert "--home" not in pasted("resume", "s", home=usual)
    assert "--home" in pasted("resume", "s", home=usual, stored=True)
    assert "--home" not in pasted("generate", own, "--prompt", "def ", home=own)
    use_home(own)
    assert shlex.split(pasted("ui"))[-2:] == ["--home", str(own)]
    monkeypatch.setenv("PARETUNE_HOME", str(own))
    assert "--home" not in pasted("ui")
    assert "--home" in pasted("ui", home=usual)


@pytest.mark.parametrize("name", [NASTY, "-x", "a\nb", "~", "*"])
def test_a_shell_gives_back_the_words(name: str, elsewhere: Path) -> None:
    line = pasted("measure", elsewhere / name, home=elsewhere / name, stored=True)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert words == ["paretune", "measure", str(elsewhere / name), "--home", str(elsewhere / name)]
    parse(line)


def test_a_path_that_looks_like_an_option_stays_a_path(elsewhere: Path) -> None:
    assert command_line.short(elsewhere / "-x") == elsewhere / "-x"
    assert command_line.short(elsewhere / "x") == Path("x")


def test_the_program_is_the_one_that_runs(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/ipykernel_launcher.py"])
    assert shlex.split(command_line.program()) == [str(Path(sys.executable)), "-m", "paretune"]


def test_the_lines_at_the_end_of_a_search_run(simulated_home: Path, tmp_path: Path) -> None:
    """`status` of a home with a nasty name, started through a shell by the printed line."""
    import shutil

    home = Path(shutil.copytree(simulated_home, tmp_path / NASTY))
    line = pasted("status", "nightly", home=home, stored=True).replace("paretune", f"{sys.executable} -m paretune", 1)
    environment = {k: v for k, v in os.environ.items() if k != "PARETUNE_HOME"}
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "explored" in done.stdout
    empty = subprocess.run(
        [sys.executable, "-m", "paretune", "status", "--home", str(tmp_path / "no [x]")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=240,
    )
    assert empty.returncode == 2
    assert shlex.quote(str(tmp_path / "no [x]")) in empty.stderr and "[x]" in empty.stderr


def test_report_and_guide_have_lines_that_the_program_takes(simulated_home: Path) -> None:
    from paretune.search.recommend.export import guide
    from paretune.search.study.store import Store
    from paretune.search.study.view import load_view
    from paretune.tracking.report.report import report_html

    store = Store.reader(simulated_home / "studies" / "nightly")
    try:
        view = load_view(store)
    finally:
        store.close()
    lines = re.findall(r"<code>(paretune [^<]+)</code>", report_html(view))
    lines = [unescape(line) for line in lines] + re.findall(r"`(paretune [^`]+)`", guide(view, view.front[0]))
    assert len(lines) >= 2
    for line in lines:
        parse(line)
    assert any(str(simulated_home) in line for line in lines)
