"""The folders: which may import which (docs/architecture.md), how full they are, and that no two files import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "paretune"
PAGE = ROOT / "docs" / "architecture.md"
MOST_MODULES, MOST_TESTS = 12, 15
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package has its folder's name."""
    found = {}
    tops = [SOURCE / "cli", *(path for path in SOURCE.iterdir() if path.is_symlink())]
    for file in [*SOURCE.glob("*.py"), *(file for top in tops for file in top.resolve().rglob("*.py"))]:
        below = file.relative_to(SOURCE if file.is_relative_to(SOURCE) else ROOT).with_suffix("")
        parts = [part for part in below.parts if part != "__init__"]
        found[".".join(["paretune", *parts])] = file
    return found


def imports_of(text: str, known: Mapping[str, object]) -> set[str]:
    """Modules of ours that a module imports, wherever in it: at the top, inside functions, or for types only."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in known else str(node.module) for full in names.values()}
    return {name for name in found if name.partition(".")[0] == "paretune"}


def graph() -> Graph:
    """Module to what it imports, without itself."""
    known = modules()
    return {name: imports_of(file.read_text(encoding="utf-8"), known) - {name} for name, file in known.items()}


def folder_of(module: str, known: Mapping[str, Path]) -> str:
    """The folder that a module lies in, without `paretune.`; `paretune` is that of the root."""
    package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    return package.removeprefix("paretune.")


def rows() -> list[str]:
    """The folders of the page, top first."""
    return re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def cycles(edges: Graph) -> list[str]:
    """What is left of a graph once everything that leads nowhere is taken away, again and again; empty if it has no cycle."""
    left = {name: set(others) & edges.keys() for name, others in edges.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_import_is_of_a_module_that_exists() -> None:
    found = graph()
    assert not {name for others in found.values() for name in others} - found.keys()


def test_no_two_files_import_each_other() -> None:
    assert cycles(graph()) == []


def test_the_page_names_every_folder_once() -> None:
    known = modules()
    found = {folder_of(name, known) for name in known}
    empty = {
        folder
        for folder in found
        if not any(folder_of(m, known) == folder for m, f in known.items() if f.name != "__init__.py")
    }
    listed = rows()
    assert len(listed) == len(set(listed))
    assert set(listed) >= found - empty and set(listed) <= found


def test_imports_point_downward_only() -> None:
    known, order = modules(), rows()
    wrong = []
    for name, others in graph().items():
        here = folder_of(name, known)
        for other in others:
            there = folder_of(other, known)
            if here in order and there in order and here != there and order.index(there) < order.index(here):
                wrong.append(f"{name} imports {other}")
    assert not wrong


@pytest.mark.parametrize(
    ("edges", "left"),
    [({"a": {"b"}, "b": set()}, []), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["a", "b", "c"]), ({"a": {"x"}}, [])],
)
def test_the_check_sees_cycles(edges: Graph, left: list[str]) -> None:
    assert cycles(edges) == left


def test_the_check_sees_every_form_of_import() -> None:
    text = """
import paretune
import paretunes.engines
def f():
    import paretune.search.study.store
    from paretune import tracking
    from paretune.spaces import space, Space
if TYPE_CHECKING:
    from paretune.common.errors import UsageError
"""
    assert imports_of(text, modules()) == {
        "paretune",
        "paretune.search.study.store",
        "paretune.tracking",
        "paretune.spaces.space",
        "paretune.spaces",
        "paretune.common.errors",
    }


def test_no_folder_is_too_full() -> None:
    counts: dict[Path, int] = {}
    for file in modules().values():
        if file.name != "__init__.py":
            counts[file.parent] = counts.get(file.parent, 0) + 1
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}
    for file in (ROOT / "tests").rglob("*.py"):
        counts[file.parent] = counts.get(file.parent, 0) + 1
    assert {str(folder): count for folder, count in counts.items() if count > MOST_TESTS} == {}


def test_every_file_that_the_page_names_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"[\w/]+\.py\b", text)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists() or (SOURCE / name).exists(), name
    for folder in re.findall(r"`(tests/\w+)/`", text):
        assert (ROOT / folder).is_dir(), folder


def test_tests_mirror_the_packages() -> None:
    packages = {path.name for path in SOURCE.iterdir() if path.is_symlink()} | {"cli"}
    other = {"project", "e2e", "browser", "gpu", "support", "data"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == packages | other
    assert not list((ROOT / "tests").glob("test_*.py"))
