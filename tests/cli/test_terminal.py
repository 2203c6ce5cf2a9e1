"""What a terminal shows: every number whole at every width, texts of users as they are, the end of a search with its reason."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paretune.cli import app as cli
from paretune.cli.commands import search as cli_search
from paretune.cli.terminal import console
from paretune.cli.terminal.table import Column, FittedTable
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.objectives import units
from paretune.objectives.measurement import Measurement
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view
from paretune.search.tasks.base import fatal

WIDTHS = (20, 40, 60, 80, 120, 200)


@pytest.fixture(scope="module")
def view(simulated_home: Path) -> StudyView:
    store = Store.reader(simulated_home / "studies" / "nightly")
    try:
        return load_view(store)
    finally:
        store.close()


def shown(renderable: Any, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, markup=False, emoji=False).print(renderable)
    return stream.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_of_the_front_is_whole_or_its_column_is_named_as_left_out(view: StudyView, width: int) -> None:
    table = console.front_table(view, view.study)
    text = shown(table, width)
    kept = table.shown(width)
    assert "…" not in text
    for row in table.rows:
        for i in kept:
            if not table.columns[i].folds and table.columns[i].title != "tie":
                assert row[i] in text.replace("\n", "") if width < 40 else row[i] in text
    left_out = [c.title for i, c in enumerate(table.columns) if i not in kept]
    told = " ".join(text.split())
    assert all(title in told for title in left_out)
    assert ("not shown in" in told) is bool(left_out)
    assert "loss" in [table.columns[i].title for i in kept]  # with the key the last to leave


def test_wide_enough_everything_is_there(view: StudyView) -> None:
    table = console.front_table(view)
    assert table.shown(console.PIPE_WIDTH) == tuple(range(len(table.columns)))


def test_a_table_too_narrow_for_its_numbers_is_told_in_lines() -> None:
    table = FittedTable((Column("name", right=False), Column("loss")), (("student", "-18.3% ±0.4%"),))
    assert "loss: -18.3% ±0.4%" in shown(table, 20)


def test_a_pipe_is_as_wide_as_it_takes_and_columns_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.width_of(io.StringIO()) == console.PIPE_WIDTH
    monkeypatch.setenv("COLUMNS", "60")
    assert console.width_of(io.StringIO()) == 60


@pytest.mark.parametrize("text", ["runs [best]", "[red]x[/red]", "[/]", ":warning: smile", "a|b\\[c]"])
def test_texts_of_users_are_printed_as_they_are(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console.talk, "_file", stream)
    console.say(("study ", "bold"), text)
    console.note(text)
    console.tell_problem(text, text)
    console.talk.print(FittedTable((Column(text),), ((text,),), text, text))
    assert stream.getvalue().count(text) >= 8
    console.screen().print(FittedTable((Column(text),), ((text,),)))
    assert capsys.readouterr().out.count(text) == 2


def test_what_the_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    console.show_all_characters()
    console.print_text("1 … 2 → é")
    sys.stdout.flush()
    assert raw.getvalue().decode("latin-1") == "1 ? 2 ? é\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(89, "89 s"), (100, "2 min"), (5399, "90 min"), (5400, "1 h 30 min"), (28_799, "8 h 0 min")]
)
def test_durations_are_rounded_once(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize("kind", [UsageError, EnvironmentProblem])
def test_a_fatal_end_says_its_reason_and_then_its_remedy(view: StudyView, kind: Any) -> None:
    outcome = fatal(kind("the disk [home] is full", "free it"))
    meta = {**view.meta, "ended": outcome.reason, "remedy": outcome.remedy}
    ended = replace(view, meta=meta)
    assert cli_search.why_ended(ended, kind.exit_code) == ("the disk [home] is full", "free it")
    told = cli_search.outcome_of(ended, kind.exit_code)
    assert told == {"exit_code": kind.exit_code, "reason": "the disk [home] is full", "remedy": "free it"}


@pytest.mark.parametrize(
    ("spent", "reason"), [(59.0, "59 of 60 s were used before the first baseline"), (5.0, "no reason is known")]
)
def test_a_budget_that_was_too_small_for_the_machine_is_said(view: StudyView, spent: float, reason: str) -> None:
    ended = replace(view, meta={**view.meta, "ended": "", "remedy": "", "spent_s": spent, "budget_s": 60.0})
    told, remedy = cli_search.why_ended(ended, 4)
    assert reason in told and "--budget" in remedy


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_no_bad_end_is_without_reason_and_remedy(
    view: StudyView, code: int, monkeypatch: pytest.MonkeyPatch, simulated_home: Path
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console.talk, "_file", stream)
    ended = replace(view, meta={**view.meta, "ended": "the budget has ended", "remedy": None})
    cli_search._show_end(ended, simulated_home, code, None)
    text = stream.getvalue()
    assert re.search(r"error: \S.*\nremedy: \S", text)
    assert text.index("report:") < text.index("error:")


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("rms_error", "", "0.5"),
        ("rms_error", "mm", "0.5 mm"),
        ("wasted_bytes", "pages", "0.5 pages"),
        ("items_ms", "1", "0.5"),
        ("decode_ms_per_token", "ms/token", "0.500 ms"),
        ("ttft_ms", "ms", "0.500 ms"),
        ("nll", "nats/token", "0.500"),
        ("relative_loss", "1", "50.0%"),
    ],
)
def test_a_unit_comes_from_the_definition_never_from_the_name(name: str, unit: str, expected: str) -> None:
    from paretune.tracking import wording

    assert units.plain(name, 0.5, unit) == expected
    m = Measurement(0.5, unit, 0.5, 0.5, "measured")
    assert wording.with_interval(name, m) == (f"+{expected}" if name == "relative_loss" else expected)
    assert units.drawn_in(name) == 1.0


def test_warnings_that_are_to_be_errors_do_not_end_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("PYTHONWARNINGS", "error")
        cli._let_warnings_be_warnings()
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_the_status_of_a_search_takes_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "talk", Console(file=io.StringIO(), force_terminal=True, markup=False, width=80))
    with console.Progress(60.0, 0.0) as progress:
        assert progress.status is not None
        progress.update("exploring [/red]")
