"""Documentation that fails when stale: commands, options, links, figures and generated pages against the program of today."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from paretune.cli import app as cli
from paretune.common.errors import EnvironmentProblem, ParetuneError
from paretune.common.yaml_file import load_model
from paretune.hardware_profiles.profile import detected_profile
from paretune.search.spec import Spec
from paretune.spaces import Space
from paretune.teachers.checkpoint.teacher import load_teacher

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results.jsonl"
FIGURES = ROOT / "teachers" / "stdlib_coder" / "figures.json"
PICTURES = ROOT / "docs" / "pictures"
PAGES = sorted(
    path
    for pattern in (
        "README.md",
        "CHANGELOG.md",
        "mlruns/README.md",
        "teachers/*/README.md",
        "docs/*.md",
        "compression/*/README.md",
        "examples/*/README.md",
    )
    for path in ROOT.glob(pattern)
)
LIVING = [page for page in PAGES if page.name != "log.md"]  # the log names commands and files of its day
NUMBER = r"([+-]?\d[\d,]*(?:\.\d+)?)"
# `0.28 <!-- bench: NAME -->` or `28 % <!-- bench: NAME.FIELD -->`; `figures:` reads the embedded teacher's figures.json
QUOTED = re.compile(NUMBER + r"\s*(%|[^\W\d]*)\s*<!-- (bench|figures): ([\w.]+) -->")
MARKER = re.compile(r"<!-- (?:bench|figures): ")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text("utf8")


def without_comments(text: str) -> str:
    """The page as it is shown: HTML comments of more than one line are notes to the writer."""
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def command_lines(text: str) -> list[str]:
    """Every `paretune …` that a reader is told to type: prompts in code blocks, and inline code with arguments."""
    typed = [line[2:] for block in code_blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    printed = [line.strip() for block in code_blocks(text, "text") for line in block.splitlines()]
    found = [line.split("#")[0].strip() for line in (*typed, *inline, *printed)]
    return [line for line in found if line.startswith("paretune ") and "…" not in line and "|" not in line]


def parse(line: str) -> None:
    """Parse a command line without running it. Raises click's usage errors."""
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("paretune", [], resilient_parsing=True)
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            command.make_context("paretune", list(words), parent=None) if words else None
            return
        inner = command.get_command(context, words[0])
        assert inner is not None, f"there is no command {words[0]!r}: {line}"
        command, words = inner, words[1:]
        context = command.make_context(
            command.name, list(words), parent=context, resilient_parsing=hasattr(command, "commands")
        )


def options_of_program() -> set[str]:
    def walk(command: Any) -> set[str]:
        found = {"--help", *(option for p in command.params for option in p.opts)}
        for inner in getattr(command, "commands", {}).values():
            found |= walk(inner)
        return found

    return walk(typer.main.get_command(cli.app))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def newest(results: Path) -> dict[str, dict[str, Any]]:
    """The last line of every benchmark name."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, filter(None, lines))}


def recorded(kind: str, key: str, results: Path = RESULTS) -> float:
    """What a marker names: `NAME` or `NAME.FIELD` of the benchmarks, or a key of the teacher's figures."""
    if kind == "figures":
        return float(json.loads(FIGURES.read_text())[key])
    benchmark, _, field = key.partition(".")
    lines = newest(results)
    assert benchmark in lines, f"{results.name} has no benchmark {benchmark!r}; it has {sorted(lines)}"
    return float(lines[benchmark][field or "value"])


def wrong_figures(text: str, results: Path = RESULTS) -> list[str]:
    """Quoted figures that differ from the recorded ones by more than their rounding."""
    found = []
    for number, unit, kind, key in QUOTED.findall(text):
        plain = number.replace(",", "")
        value = recorded(kind, key, results) * (100 if unit == "%" else 1)
        digits = len(plain.partition(".")[2])
        if abs(float(plain) - value) > 0.5000001 * 10**-digits:
            found.append(f"{number} {unit} is quoted, but {key} is {value:.6g}")
    return found


def test_cli_page_is_the_help_of_today() -> None:
    module = script("make_cli")
    assert (ROOT / "docs" / "cli.md").read_text() == module.render(), "run python docs/make_cli.py"


def test_api_page_is_the_description_of_today() -> None:
    module = script("make_api")
    assert (ROOT / "docs" / "api.md").read_text() == module.page(), "run python docs/make_api.py"


def test_cli_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("make_cli")
    wanted = module.render()
    for variable, value in (
        ("COLUMNS", "40"),
        ("FORCE_COLOR", "1"),
        ("GITHUB_ACTIONS", "true"),
        ("PARETUNE_HOME", "/x"),
    ):
        monkeypatch.setenv(variable, value)
    assert module.render() == wanted
    assert "\x1b" not in wanted


def test_cli_page_has_every_command() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for path, _ in script("make_cli").walk(typer.main.get_command(cli.app), ("paretune",)):
        assert f"## {' '.join(path)}\n" in page


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_commands_parse(page: Path) -> None:
    for line in command_lines(text_of(page)):
        parse(line)


def test_readme_shows_commands() -> None:
    lines = command_lines(text_of(ROOT / "README.md"))
    shown = {shlex.split(line)[1] for line in lines}
    assert {"search", "front", "recommend", "generate", "measure", "hardware"} <= shown


@pytest.mark.parametrize(
    "line",
    [
        "paretune serach",
        "paretune front --colour",
        "paretune recommend --max-latency fast",
        "paretune hardware shw",
        "paretune generate DIR",
        "paretune --colour",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 (an AssertionError of ours or one of click's many)
        parse(line)


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_options_exist(page: Path) -> None:
    text = text_of(page)
    own = {"--check", "--seconds", "--browser", "--out", "--no-deps", "--resources"}  # of other programs
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", without_comments(text))):
        assert option in options_of_program() | own, f"{name(page)} names {option}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_comments(text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            headings = {slug(h) for h in re.findall(r"^#+ (.+)$", text_of(file), flags=re.MULTILINE)}
            assert anchor in headings, f"{name(page)} links to the heading {target}"


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_files_named_exist(page: Path) -> None:
    """Inline code that looks like a path of the repository is one: a known folder, a slash, a suffix."""
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._" and path.name != "mlruns"
    )
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text_of(page)):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_every_picture_is_shown() -> None:
    shown = "".join(without_comments(text_of(page)) for page in LIVING)
    for picture in sorted(PICTURES.glob("*.png")):
        assert f"pictures/{picture.name})" in shown, f"no page shows docs/pictures/{picture.name}"


def test_pictures_need_a_study_and_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module = script("make_pictures")
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", "--home", str(tmp_path)])
    assert module.main() == 2
    assert "no complete study" in capsys.readouterr().err
    monkeypatch.setattr(module, "find_study", lambda _home, _wanted: tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", "--browser", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert module.main() == 5
    assert "apt-get install chromium" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)  # as if it were not installed
    with pytest.raises(EnvironmentProblem, match="pip install playwright"), module.open_browser(sys.executable):
        pass


SEARCHING = ROOT / "docs" / "searching.md"


def test_settings_on_the_page_are_valid(tmp_path: Path) -> None:
    blocks = code_blocks(text_of(SEARCHING), "yaml")
    assert blocks
    for block in blocks:
        file = tmp_path / "spec.yaml"
        file.write_text(block)
        assert load_model(file, Spec).budget_s > 0


def test_readme_counts_the_space() -> None:
    profile = detected_profile()
    size = replace(
        Space.of(load_teacher("stdlib-coder").shape, profile.weight_formats, second_order=False), mixed=True
    ).size()
    assert f"{size:,} candidates" in text_of(ROOT / "README.md")


def test_exit_codes_are_listed() -> None:
    table = re.search(r"## Exit codes\n(.*?)\n## ", text_of(SEARCHING), flags=re.DOTALL)
    assert table is not None
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table[1], flags=re.MULTILINE)}
    documented = {int(code) for code in re.findall(r"\b(\d+) [a-z]", (cli.__doc__ or "").partition("Exit codes:")[2])}
    kinds: list[type[ParetuneError]] = [ParetuneError, *ParetuneError.__subclasses__()]
    raised = {kind.exit_code for kind in kinds}
    assert listed == documented
    assert raised <= listed


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_figures_are_the_recorded_ones(page: Path) -> None:
    text = text_of(page)
    assert len(MARKER.findall(text)) == len(QUOTED.findall(text)), f"{name(page)}: a marker follows no number"
    assert wrong_figures(text) == []


def test_a_wrong_figure_is_noticed(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"name": "a", "value": 1.0}\n{"name": "a", "value": 0.2849, "share": 0.031}\n')
    assert (
        wrong_figures("0.28 <!-- bench: a --> and 0.285 s <!-- bench: a -->, 3.1 % <!-- bench: a.share -->", results)
        == []
    )
    assert (
        len(wrong_figures("1.0 <!-- bench: a -->, 0.29 <!-- bench: a -->, 3.2 % <!-- bench: a.share -->", results)) == 3
    )
    with pytest.raises(AssertionError, match="no benchmark 'b'"):
        wrong_figures("1 <!-- bench: b -->", results)


def test_readme_leads_to_every_page() -> None:
    readme = text_of(ROOT / "README.md")
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"](docs/{page.name}" in readme, f"README.md links to no docs/{page.name}"


def test_pages_name_nothing_private() -> None:
    """No path of one machine in the documentation of a product."""
    for page in LIVING:
        assert not re.search(r"(?<![\w.])/(?:work|root|tmp)/", text_of(page)), name(page)
