"""Docstrings: every public module, class, function and method of the package has one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "paretune"
MODULE = "the module"
Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

MADE_UP = '''
import typing

def told():
    """Has one."""
    def nested(): ...

def bare(): ...

async def bare_too():
    return 1

def blank():
    """   """

def _private(): ...

if typing.TYPE_CHECKING:
    def in_a_branch(): ...
else:
    class InTheOther: ...

class Shown:
    """Has one."""

    @property
    def size(self): ...

    @typing.overload
    def at(self, i: int) -> int: ...

    def __len__(self): ...

    def _hidden(self): ...

    class Inner:
        """Has one."""

        def deep(self): ...

class _Hidden:
    def of_no_interest(self): ...
'''


def source_files() -> list[Path]:
    """Every Python file of the package, in the folders behind its links too."""
    folders = [SOURCE / "cli", *(path.resolve() for path in SOURCE.iterdir() if path.is_symlink())]
    return sorted([*SOURCE.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))])


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Named]]:
    """(dotted name, node) of what is public: at the top level, in branches of it, and in public classes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Named):
            yield from definitions(child, prefix)
        elif not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


def undocumented(text: str) -> list[str]:
    """Names of what lacks a docstring in a source text, MODULE for the module itself."""
    tree = ast.parse(text)
    named: list[tuple[str, Named | ast.Module]] = [(MODULE, tree), *definitions(tree)]
    return [name for name, node in named if not ast.get_docstring(node)]


def test_everything_public_has_a_docstring() -> None:
    files = source_files()
    assert len(files) > 300
    lacking = {
        file.relative_to(ROOT).as_posix(): found
        for file in files
        if (found := undocumented(file.read_text(encoding="utf-8")))
    }
    assert lacking == {}


def test_the_check_sees_what_it_should() -> None:
    assert undocumented(MADE_UP) == [
        MODULE,
        "bare",
        "bare_too",
        "blank",
        "in_a_branch",
        "InTheOther",
        "Shown.size",
        "Shown.at",
        "Shown.Inner.deep",
    ]
    assert undocumented('"""Has one."""') == []
