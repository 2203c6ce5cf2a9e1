"""Shell completion: what the shell is told, and that it is told quickly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def home(simulated_home: Path, tmp_path: Path) -> Path:
    home = Path(shutil.copytree(simulated_home, tmp_path / "mlruns"))
    shutil.copytree(home / "studies" / "nightly", home / "studies" / "another")
    return home


def completions(line: str, cwd: Path) -> list[str]:
    """What bash would offer for the last word of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_PARETUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "import sys; sys.argv = ['paretune']; from paretune.cli.app import main; main()",
        ],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    imported = {part.rpartition("|")[2].strip() for part in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "mlflow", "pandas", "onnxruntime", "fastapi"}, (
        "a shell does not wait for these"
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("paretune resu", ["resume"]),
        ("paretune status night", ["nightly"]),
        ("paretune report ", ["another", "nightly"]),
        ("paretune recommend nightly --goal f", ["fastest"]),
        ("paretune recommend --profile nvidia-t", ["nvidia-t4"]),
        ("paretune search --preset o", ["overnight"]),
        ("paretune search --sampler n", ["nsga2"]),
        ("paretune status zzz", []),
    ],
)
def test_words_are_completed(home: Path, line: str, offered: list[str]) -> None:
    assert sorted(completions(line, home.parent)) == offered


def test_bash_gets_a_script(tmp_path: Path) -> None:
    """Of a bash: the shell is found among the parents, and what starts the tests need be none."""
    program = (
        "import sys; sys.argv = ['paretune', '--show-completion', 'bash']; from paretune.cli.app import main; main()"
    )
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1"; exit $?', sys.executable, program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and "_PARETUNE_COMPLETE" in done.stdout
