"""The Dockerfile: linted, and what it copies and runs is there. No engine is needed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from paretune.cli import app as cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert program is not None, "hadolint is in the dev extra"
    return subprocess.run(
        [program, "--failure-threshold", "style", str(file)], capture_output=True, text=True, timeout=240
    )


def test_the_dockerfile_is_linted() -> None:
    done = hadolint(ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /x && sudo pip install torch\n")
    assert hadolint(bad).returncode != 0


def test_versions_are_the_projects_own() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name, version in re.findall(r"\b(torch|build)==([\d.]+)", TEXT):
        assert pinned[name] == version
    for line in TEXT.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


def test_it_starts_the_service_as_nobody_special() -> None:
    entry = re.findall(r"^(?:ENTRYPOINT|CMD) \[(.*)\]", TEXT, flags=re.MULTILINE)
    words = [word for line in entry for word in shlex.split(line.replace(",", " "))]
    assert words[0] == "paretune"
    command = typer.main.get_command(cli.app)
    context = command.make_context("paretune", words[1:], resilient_parsing=True)
    assert "serve" in command.list_commands(context)  # type: ignore[attr-defined]
    assert TEXT.index("USER 1000") < TEXT.index("ENTRYPOINT")
    assert "TOKEN=" not in TEXT, "a token never belongs into an image"


@pytest.mark.parametrize("kept_out", [".git", ".venv", "mlruns/*"])
def test_what_is_private_is_not_copied(kept_out: str) -> None:
    assert kept_out in (ROOT / ".dockerignore").read_text().splitlines()
