"""An error names its own cause: permission, a folder, a dangling link, a loop, a path too long; never a guess at damage.

Root ignores modes, so the program runs as root without the capability to do so: other users' files are closed to it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paretune.common import file_access as access
from paretune.common.errors import UsageError

STRANGER = 12345
WITHOUT = "-dac_override,-dac_read_search"
SETPRIV = ["setpriv", f"--bounding-set={WITHOUT}", f"--inh-caps={WITHOUT}"]


def possible() -> bool:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*SETPRIV, sys.executable, "-c", ""], capture_output=True).returncode == 0


as_other = pytest.mark.skipif(not possible(), reason="needs root and setpriv: files of another user")


def paretune(*words: object) -> tuple[int, str]:
    command = [*SETPRIV, sys.executable, "-m", "paretune", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def close(path: Path) -> Path:
    """Give it to another user, for that user alone."""
    os.chown(path, STRANGER, STRANGER)
    path.chmod(0o700 if path.is_dir() else 0o600)
    return path


def search(teacher: Path, home: Path) -> tuple[int, str]:
    return paretune("search", "--dry-run", "--teacher", teacher, "--home", home)


@as_other
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "."])
def test_a_teacher_of_another_user(name: str, tmp_path: Path, tiny_teacher_dir: Path) -> None:
    teacher = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "teacher"))
    closed = close(teacher / name)
    code, told = search(teacher, tmp_path / "home")
    assert code == 2
    assert "ermission" in told and str(closed) in told and str(STRANGER) in told
    assert "remedy: let its owner run `chmod" in told
    assert "copy" not in told and "safetensors file" not in told and "bug" not in told


@as_other
def test_a_home_and_a_study_of_another_user(tmp_path: Path, simulated_home: Path) -> None:
    home = Path(shutil.copytree(simulated_home, tmp_path / "home"))
    database = close(home / "studies" / "nightly" / "study.db")
    code, told = paretune("status", "nightly", "--home", home)
    assert code == 2 and "ermission" in told and str(database) in told and "disk" not in told
    close(home)
    code, told = paretune("status", "nightly", "--home", home)
    assert code in (2, 5) and "ermission" in told and str(home) in told and "bug" not in told
    code, told = paretune("search", "--dry-run", "--home", home)
    assert code in (2, 5) and "ermission" in told and str(home) in told and "bug" not in told


@as_other
def test_a_settings_file_and_an_artifact_of_another_user(tmp_path: Path, simulated_home: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("budget: 9m\n")
    close(spec)
    code, told = paretune("search", "--dry-run", spec, "--home", tmp_path / "home")
    assert code == 2 and "ermission" in told and str(spec) in told
    profile = tmp_path / "board.yaml"
    profile.write_text("name: board\n")
    close(profile)
    code, told = paretune("hardware", "check", profile)
    assert code == 2 and "ermission" in told and str(profile) in told


def _link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone.bin")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [(_link_to_nothing, "symbolic link to"), (_loop, "Too many levels of symbolic links"), (_folder, "")],
)
def test_what_is_no_file(
    name: str, change: Callable[[Path], None], expected: str, tmp_path: Path, tiny_teacher_dir: Path
) -> None:
    from paretune.teachers.checkpoint.teacher import load_teacher

    teacher = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "teacher"))
    change(teacher / name)
    with pytest.raises(UsageError) as caught:
        load_teacher(str(teacher))
    assert expected in caught.value.problem
    assert "half-written" not in caught.value.remedy


def test_an_unforeseen_refusal_of_the_system_is_no_bug(tmp_path: Path) -> None:
    for number in (13, 40, 36, 5, 24):
        problem = access.path_problem(OSError(number, os.strerror(number), str(tmp_path / "x")))
        assert problem is not None and str(tmp_path) in problem.problem and problem.remedy
    assert access.path_problem(OSError(2, os.strerror(2), str(tmp_path / "x"))) is None
    nowhere = access.path_problem(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"))
    assert nowhere is not None and "TMPDIR" in nowhere.remedy


def test_a_kept_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    from paretune.common.files import read_kept

    (tmp_path / "kept.json").mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert read_kept(tmp_path / "kept.json") is None
