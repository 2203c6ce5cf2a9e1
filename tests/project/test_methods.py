"""The page of methods: every row that the program's types know, figures as they are today, and the table of losses behind it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from paretune.hardware_profiles.profile import Profile
from paretune.objectives.quality.quality import Scores
from paretune.search.spec import Spec
from paretune.spaces.candidate import Algorithm, PatternKind, Score
from paretune.teachers.checkpoint.families import FAMILIES
from paretune.teachers.checkpoint.teacher import load_teacher

ROOT = Path(__file__).resolve().parents[2]


def _page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_methods"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


page = _page()
table = page.table
SAMPLE = [
    (pattern, case.name, list(FAMILIES)[(i + j) % len(FAMILIES)])
    for i, (pattern, rows) in enumerate(page.cases().items())
    for j, case in enumerate(rows)
    if pattern == "dense" or (i + j) % 3 == 0
]


def tables_of(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Cells by pattern, row and family, as the page has them."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for pattern, body in re.findall(r"^### (.+)\n\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        header, _, *rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in body.splitlines()]
        found[pattern] = {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    kept: dict[str, Any] = {}

    def find(family: str) -> Any:
        if family not in kept:
            kept[family] = page.Bench(family, tmp_path_factory.mktemp(family))
        return kept[family]

    return find


def test_the_page_has_every_method_pattern_and_family() -> None:
    kept = tables_of(page.PAGE.read_text())
    wanted = {pattern: {case.name: list(FAMILIES) for case in rows} for pattern, rows in page.cases().items()}
    assert {p: {name: list(cells) for name, cells in rows.items()} for p, rows in kept.items()} == wanted, (
        "run python docs/make_methods.py"
    )


def test_the_rows_are_all_that_the_types_name() -> None:
    rows = page.cases()
    names = " ".join(case.name for cases in rows.values() for case in cases)
    assert set(rows) == {"dense" if kind == "none" else kind for kind in get_args(PatternKind)} - {"given"}
    for kernel in Profile.model_fields["weight_formats"].default:
        assert kernel in names
    for algorithm in get_args(Algorithm):
        assert algorithm.upper() in names
    for pattern, cases in rows.items():
        if pattern != "dense":
            assert {case.pattern.score for case in cases} == set(get_args(Score))


@pytest.mark.parametrize(("pattern", "row", "family"), SAMPLE)
def test_what_ships_is_what_was_searched(pattern: str, row: str, family: str, bench: Callable[[str], Any]) -> None:
    case = next(case for case in page.cases()[pattern] if case.name == row)
    found = bench(family).measure(case)
    assert found.difference <= page.models.BAR
    assert found.control > 10 * page.models.BAR, "a deliberate mistake passed"
    kept = tables_of(page.PAGE.read_text())[pattern][row][family]
    assert page.models.same_page(kept, page.cell(found)), "run python docs/make_methods.py"


def scores(*nll: float) -> Scores:
    return Scores(tuple("abcdef"), tuple(100 * v for v in nll), (100,) * 6)


def test_an_ordering_is_shown_where_the_paired_interval_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents differ much more than methods do; only the pairing tells."""
    base = (1.0, 2.0, 3.0, 1.5, 2.5, 3.5)
    results = {
        "base": scores(*base),
        "better": scores(*(v - 0.01 - 0.001 * i for i, v in enumerate(base))),
        "mixed": scores(*(v + (0.01 if i % 2 else -0.01) for i, v in enumerate(base))),
    }
    named = [(s, a, b) for s, a, b in (("s", "better", "base"), ("s", "mixed", "base"), ("s", "base", "better"))]
    monkeypatch.setattr(table, "orderings", lambda: named)
    found = table.judged({name: {"s": table.Result(value, 1)} for name, value in results.items()})
    assert [o["verdict"] for o in found] == ["shown", "tie", "reversed"]
    assert found[0]["difference"][0] == pytest.approx(-0.0125)
    assert found[0]["difference"][1] <= -0.0125 <= found[0]["difference"][2] < 0


def test_the_orderings_name_methods_and_each_has_a_stage() -> None:
    rows = {m.name: m for m in table.methods(load_teacher("stdlib-coder").shape)}
    assert len(rows) == len(table.methods(load_teacher("stdlib-coder").shape)), "two methods have one name"
    for stage, better, worse in table.orderings():
        assert stage in table.STAGES and {better, worse} <= rows.keys()
        assert stage == table.STAGES[1] or not (rows[better].qat or rows[worse].qat)


def test_the_recorded_table_has_the_methods_of_today() -> None:
    if not table.FILE.exists():
        pytest.skip("make bench NAME=method_table has not been run")
    kept = json.loads(table.FILE.read_text())
    assert [row["method"] for row in kept["rows"]] == [
        m.name for m in table.methods(load_teacher("stdlib-coder").shape)
    ]
    assert [(o["stage"], o["better"], o["worse"]) for o in kept["orderings"]] == table.orderings()
    for o in kept["orderings"]:
        value, low, high = o["difference"]
        assert low <= value <= high
        assert o["verdict"] == ("shown" if high < 0 else "reversed" if low > 0 else "tie")
    assert table.markdown(kept) in page.PAGE.read_text(), "run python docs/make_methods.py"


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    every, names = table.methods, ["fp32", "2:4 magnitude", "int4 groups of 32 RTN", "int4 groups of 32 QAT"]
    monkeypatch.setattr(table, "methods", lambda shape: [m for m in every(shape) if m.name in names])
    monkeypatch.setattr(table, "orderings", lambda: [("recovered", names[3], names[2])])
    yield names


def test_a_table_of_a_small_teacher(
    few_methods: list[str], tiny_teacher_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    spec = Spec(teacher=str(tiny_teacher_dir), data=str(tiny_text), report_tokens=2000)
    found = table.make_table(spec, tmp_path, 2048)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == few_methods
    assert rows["fp32"]["as it is"]["nll_increase"] == [0, 0, 0]
    assert rows["fp32"]["recovered"]["nll_increase"] != [0, 0, 0]
    assert "as it is" not in rows[few_methods[3]]
    assert rows[few_methods[2]]["as it is"]["compressed_bytes"] < rows["fp32"]["as it is"]["compressed_bytes"] / 2
    assert found["documents"] > 1 and len(found["orderings"]) == 1
    text = table.markdown(found)
    assert all(f"| {name} |" in text for name in few_methods)
