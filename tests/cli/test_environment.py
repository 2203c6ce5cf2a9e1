"""Ray's processes start in poor surroundings: a long TMPDIR, no home, a user without an entry, few open files."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from pathlib import Path

import pytest

from paretune.common.errors import EnvironmentProblem
from paretune.search.execution import surroundings
from paretune.search.execution.ray_executor import passed_on
from paretune.search.execution.surroundings import SOCKET_BYTES, not_started, prepare_environment, session_folder

SOCKET = "session_2026-11-28_03-21-34_123456_4194304/sockets/plasma_store"


def use_temp(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder))


@pytest.mark.parametrize("name", ["x" * 60, "with space", "100%", "é", "[best]", "$HOME"])
def test_a_temporary_folder_that_is_no_place_for_sockets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    use_temp(monkeypatch, folder)
    found = session_folder()
    try:
        assert not found.is_relative_to(folder)
        assert len(os.fsencode(found / SOCKET)) <= SOCKET_BYTES
        assert stat.S_IMODE(found.stat().st_mode) == 0o700
    finally:
        found.rmdir()


def test_a_short_temporary_folder_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    use_temp(monkeypatch, Path("/tmp"))
    found = session_folder()
    found.rmdir()
    assert found.parent == Path("/tmp")


def test_without_any_place_the_search_says_so_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_candidates", lambda: [tmp_path / "gone", tmp_path / ("x" * 90)])
    with pytest.raises(EnvironmentProblem, match="at most") as caught:
        session_folder()
    assert "TMPDIR" in caught.value.remedy and caught.value.exit_code == 5


@pytest.mark.parametrize("home", [None, "", "/nonexistent", "relative"])
def test_a_home_that_cannot_be_written_is_replaced(home: str | None, tmp_path: Path) -> None:
    environment = {} if home is None else {"HOME": home}
    prepare_environment(environment, tmp_path)
    own = Path(environment["HOME"])
    assert own.is_dir() and own.is_relative_to(tmp_path)


def test_a_home_that_can_be_written_stays(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "USER": "somebody"}
    prepare_environment(environment, tmp_path / "runs")
    assert environment == {"HOME": str(tmp_path), "USER": "somebody"}


def test_a_user_without_an_entry_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_123)
    environment = {"HOME": str(tmp_path)}
    prepare_environment(environment, tmp_path)
    assert environment["USER"] == "uid4000123"


def test_another_cluster_is_forgotten_for_a_local_one_only(tmp_path: Path) -> None:
    given = {"HOME": str(tmp_path), "USER": "u", "RAY_ADDRESS": "10.0.0.1:6379", "RAY_TMPDIR": "/x", "RAY_other": "1"}
    environment = dict(given)
    prepare_environment(environment, tmp_path, local=False)
    assert environment == given
    prepare_environment(environment, tmp_path)
    assert passed_on(environment) == {"RAY_other": "1"}


def test_few_open_files_become_as_many_as_allowed(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        prepare_environment({"HOME": str(tmp_path), "USER": "u"}, tmp_path)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(
            surroundings.OPEN_FILES, hard if hard != resource.RLIM_INFINITY else surroundings.OPEN_FILES
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_ray_that_does_not_start_is_the_machines_problem(tmp_path: Path) -> None:
    problem = not_started(RuntimeError("The current node timed out\nlong story"), tmp_path / "pt-x")
    assert problem.exit_code == 5
    assert "The current node timed out" in problem.problem and "ulimit -n" in problem.remedy
