"""Where a home's MLflow database and files are, also in a home that was moved or copied, or has odd characters in its path."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote

from paretune.tracking.mlflow.experiment import EXPERIMENT

# Where MLflow keeps addresses of files; a version without one of these tables or columns is stepped over.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def database_path(home: Path) -> Path:
    """Return the absolute path of the home's MLflow database, which need not exist."""
    return home.resolve() / "mlflow.db"


def database_uri(home: Path) -> str:
    """The SQLAlchemy address of the home's database, quoted: it is unquoted when opened, and a `?` would end the path.

    It names the driver: of an address that begins with `sqlite:///` MLflow makes the folder as it is quoted, beside the home.
    """
    return f"sqlite+pysqlite:///{quote(str(database_path(home)))}"


def artifact_root(home: Path) -> str:
    """Address of the folder that holds the files of runs."""
    return (home.resolve() / "artifacts").as_uri()


def follow_home(home: Path) -> int:
    """Point what MLflow keeps to the files of `home`, after it was moved or copied; returns how many addresses changed.

    To be called by the only writer. Raises sqlite3.Error for a database that cannot be written.
    """
    path, new = database_path(home), artifact_root(home)
    if not path.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(path, timeout=10.0)) as database, database:
        old = _recorded(database)
        if old is None or old == new:
            return 0
        return sum(_repoint(database, table, column, old, new) for table, column in ADDRESSES)


def _recorded(database: sqlite3.Connection) -> str | None:
    """Where our experiment says that its files are, if that is a folder of this machine."""
    try:
        query = "SELECT artifact_location FROM experiments WHERE name = ?"
        found = database.execute(query, (EXPERIMENT,)).fetchone()
    except sqlite3.OperationalError:  # no tables yet
        return None
    return str(found[0]) if found is not None and str(found[0]).startswith("file:") else None


def _repoint(database: sqlite3.Connection, table: str, column: str, old: str, new: str) -> int:
    columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
    if column not in columns:
        return 0
    statement = (
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?"
    )
    return database.execute(statement, (new, len(old) + 1, old, len(old) + 1, f"{old}/")).rowcount
