"""A home's MLflow database and files, wherever the home is and went."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from paretune.service.server.mlflow_page import mlflow_process
from paretune.tracking.mlflow.paths import ADDRESSES, artifact_root, database_path, database_uri, follow_home

WRITE = """
import sys
from pathlib import Path
from mlflow import MlflowClient
from paretune.tracking.mlflow.experiment import EXPERIMENT
from paretune.tracking.mlflow.paths import artifact_root, database_uri, follow_home
home = Path(sys.argv[1])
follow_home(home)
client = MlflowClient(database_uri(home), database_uri(home))
found = client.get_experiment_by_name(EXPERIMENT)
experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=artifact_root(home))
for run in [*client.search_runs([experiment]), client.create_run(experiment)]:
    client.log_text(run.info.run_id, "text", "folder/file.txt")
"""
ODD = ("feature%2Flogin", "a?b", "a%20b", "100%", "a b#c;d&e", "ümlaut", "runs [best]", "it's")


def write(home: Path) -> None:
    """One more run with a file, and the file again for every run that was there."""
    subprocess.run([sys.executable, "-c", WRITE, str(home)], check=True, timeout=200, capture_output=True)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one home whose name has everything that addresses quote, and a run in it."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "feature%2Flogin?").mkdir()
    write(folder / "feature%2Flogin?")
    return folder


def addresses(home: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(database_path(home))) as database:
        rows = [database.execute(f"SELECT {column} FROM {table}").fetchall() for table, column in ADDRESSES]
    return {value for found in rows for (value,) in found if value and value.startswith("file:")}


def test_a_home_with_an_odd_name_holds_all_that_is_written(template: Path) -> None:
    """Nothing beside it: neither a database at half of its name nor an empty folder at its quoted one."""
    home = template / "feature%2Flogin?"
    assert [path.name for path in template.iterdir()] == [home.name]
    assert database_path(home).is_file() and len(list(home.rglob("file.txt"))) == 1


@pytest.mark.parametrize("name", ODD)
def test_the_address_of_a_database_leads_to_it(tmp_path: Path, name: str) -> None:
    """As SQLAlchemy reads it, which unquotes it and ends the path at a question mark."""
    from sqlalchemy import create_engine

    home = tmp_path / name
    home.mkdir()
    engine = create_engine(database_uri(home))
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    engine.dispose()
    assert database_path(home).is_file()
    assert Path(unquote(urlparse(artifact_root(home)).path)) == home / "artifacts"


def test_a_moved_home_keeps_its_files_and_gets_the_new_ones(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "before")
    old = template / "feature%2Flogin?"
    gone = tmp_path / "before" / "feature%2Flogin?"
    home = tmp_path / "moved"
    gone.rename(home)
    before = sorted(path.name for path in template.rglob("*"))
    write(home)
    found = addresses(home)
    assert found and all(Path(unquote(urlparse(value).path)).is_relative_to(home) for value in found)
    assert len(list(home.rglob("file.txt"))) == 2
    assert sorted(path.name for path in template.rglob("*")) == before and old.is_dir() and not gone.exists()


def test_the_page_of_a_copy_shows_the_copy_s_files(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before anything is recorded anew, as after a move, a restore or a mount elsewhere."""
    home = Path(shutil.copytree(template / "feature%2Flogin?", tmp_path / "copy #1"))
    monkeypatch.setattr("paretune.service.server.mlflow_page._wait", lambda *_: None)
    with mlflow_process(home):
        assert all(Path(unquote(urlparse(value).path)).is_relative_to(home) for value in addresses(home))


def test_a_home_below_a_folder_that_only_others_may_write(tmp_path: Path) -> None:
    """`/mnt/My Drive/home`: nothing may be made beside it, so nothing is."""
    above = tmp_path / "mnt"
    home = above / "My Drive"
    home.mkdir(parents=True)
    above.chmod(0o555)
    try:
        with_root = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 and shutil.which("setpriv") else []
        done = subprocess.run([*with_root, sys.executable, "-c", WRITE, str(home)], capture_output=True, timeout=200)
        assert done.returncode == 0, done.stderr.decode()[-500:]
        assert [path.name for path in above.iterdir()] == [home.name]
    finally:
        above.chmod(0o755)


def test_what_is_not_ours_stays(template: Path, tmp_path: Path) -> None:
    """Addresses elsewhere, of a folder whose name only begins alike too, are not changed; a second look changes nothing."""
    home = Path(shutil.copytree(template / "feature%2Flogin?", tmp_path / "copy"))
    alike, elsewhere = f"{artifact_root(template / 'feature%2Flogin?')}2/x", "s3://bucket/x"
    with contextlib.closing(sqlite3.connect(database_path(home))) as database, database:
        database.execute(
            "INSERT INTO experiments (name, artifact_location, lifecycle_stage) VALUES ('a', ?, 'active')", (alike,)
        )
        database.execute(
            "INSERT INTO experiments (name, artifact_location, lifecycle_stage) VALUES ('b', ?, 'active')", (elsewhere,)
        )
    assert follow_home(home) >= 2
    assert follow_home(home) == 0
    with contextlib.closing(sqlite3.connect(database_path(home))) as database:
        kept = dict(database.execute("SELECT name, artifact_location FROM experiments").fetchall())
    assert (kept["a"], kept["b"], kept["paretune"]) == (alike, elsewhere, artifact_root(home))


def test_a_home_without_a_database_has_nothing_to_follow(tmp_path: Path) -> None:
    assert follow_home(tmp_path) == 0
    (tmp_path / "mlflow.db").touch()
    assert follow_home(tmp_path) == 0
