"""Files are UTF-8 whatever the locale; a terminal of another encoding gets what it can show.

Python turns the C locale into UTF-8, so the locale here is generated as ISO-8859-1; a machine without localedef skips.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()] + ["docs", "benchmarks"]
SOURCES = [*(ROOT / "src" / "paretune").glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]
OTHERS = {"os", "webbrowser", "tarfile", "zipfile", "Image"}  # their open() takes no encoding


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in a Latin-1 locale."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("needs localedef to generate a Latin-1 locale")
    made = subprocess.run(
        ["localedef", "-c", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US")], capture_output=True
    )
    if not (folder / "en_US" / "LC_CTYPE").exists():
        pytest.skip(f"localedef made no locale: {made.stderr.decode('utf8', 'replace')[:200]}")
    hidden = ("LANG", "LANGUAGE", "PYTHONUTF8", "PYTHONIOENCODING")
    kept = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("LC_")}
    environment = {**kept, "LOCPATH": str(folder), "LC_ALL": "en_US"}
    told = run(environment, "-c", "import locale; print(locale.getpreferredencoding(False))").stdout.decode().strip()
    if told.upper() not in ("ISO-8859-1", "ISO8859-1", "LATIN-1"):
        pytest.skip(f"the generated locale says {told!r}")
    return environment


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, timeout=200)


def without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the locale's encoding."""
    f = call.func
    name = f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
    given = {k.arg for k in call.keywords}
    if "encoding" in given or (isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in OTHERS):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) == (name == "write_text")
    if name in ("run", "Popen", "check_output", "TemporaryFile", "NamedTemporaryFile"):
        return bool(given & {"text", "universal_newlines"})
    if name != "open":
        return False
    at = 0 if isinstance(f, ast.Attribute) else 1
    mode = next((k.value for k in call.keywords if k.arg == "mode"), call.args[at] if len(call.args) > at else None)
    return mode is None or (isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value)


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.Call) and without_encoding(node)
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("p.read_text()", True),
        ("p.open('a')", True),
        ("p.open('rb')", False),
        ("open(p)", True),
        ("os.open(p, 1)", False),
    ],
)
def test_the_rule_finds_them(source: str, wrong: bool) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call) and without_encoding(call) is wrong


def test_a_study_is_told_exported_and_synced_in_latin_1(
    latin: dict[str, str], simulated_home: Path, tmp_path: Path
) -> None:
    home = Path(shutil.copytree(simulated_home, tmp_path / "home"))
    place = ["--home", str(home)]
    done = run(latin, "-m", "paretune", "recommend", "nightly", *place, "--export", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert b"\x3f" in done.stdout  # what Latin-1 lacks is a question mark
    assert "…" in (tmp_path / "out" / "HOW_TO_RUN.md").read_text("utf8")
    for words in (["front", "nightly"], ["report", "nightly"], ["status", "nightly"], ["hardware", "list"]):
        done = run(latin, "-m", "paretune", *words, *place)
        assert done.returncode == 0, (words, done.stderr)
    assert "★" in (home / "studies" / "nightly" / "report.html").read_text("utf8")
    done = run(latin, "-m", "paretune", "recommend", "nightly", *place, "--json")
    assert json.loads(done.stdout)["feasible"]


def test_mlflow_gets_its_notes_in_latin_1(latin: dict[str, str], simulated_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(simulated_home, tmp_path / "home"))
    done = run(latin, "-m", "paretune", "sync", "nightly", "--home", str(home), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["synced"] > 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_a_terminal_that_shows_little_ends_nothing(encoding: str, simulated_home: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run(environment, "-m", "paretune", "recommend", "nightly", "--home", str(simulated_home))
    assert done.returncode == 0, done.stderr
