"""Rows about the environment: temporary folders, users, locales, paths, terminals, and what is printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from benchmarks.reports.row import Row, Seen
from benchmarks.reports.world import World, have, write_documents, write_teacher

LOCALE = "en_US.ISO-8859-1"
STRANGER = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups")


def inputs(world: World) -> tuple[Path, Path]:
    return write_teacher(world.folder / "teacher"), write_documents(world.folder / "text")


def long_temporary_folder(world: World) -> Seen:
    """A TMPDIR of 70 characters, too long for the sockets of Ray below it."""
    folder = world.folder / "t"
    folder = folder.with_name("t" * max(1, 70 - len(str(world.folder)) - 1))
    folder.mkdir()
    return Seen.runs(world.search(*inputs(world), variables={"TMPDIR": str(folder)}))


def user_without_entry(world: World) -> Seen:
    """A user id that /etc/passwd does not name, with HOME=/, as a container gives."""
    if not have("setpriv"):
        return Seen("runs", "needs root and setpriv", None)
    private = next((p for p in Path(sys.executable).resolve().parents if not p.stat().st_mode & 0o001), None)
    if private is not None:
        return Seen("runs", f"Python lies in {private}, which other users may not enter: chmod o+x, then again", None)
    teacher, data = inputs(world)
    for path in (world.folder, *world.folder.rglob("*")):
        os.chown(path, 12345, 12345)
    variables = {"HOME": "/", "USER": None, "LOGNAME": None, "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    return Seen.runs(world.search(teacher, data, prefix=STRANGER, variables=variables))


def unreadable_weights(world: World) -> Seen:
    """Weights of mode 0600 of another user: the message names the permission."""
    if not have("setpriv"):
        return Seen("permission, by name", "needs root and setpriv", None)
    teacher, data = inputs(world)
    world.folder.chmod(0o777)
    (teacher / "model.safetensors").chmod(0o600)
    ended = world.plan(teacher, data, prefix=STRANGER, variables={"HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"})
    named = "ermission" in ended.text and "model.safetensors" in ended.text and "copy" not in ended.text
    return Seen(
        "exit 2 or 5, permission and file named", f"exit {ended.code}: {ended.tail()}", ended.code in (2, 5) and named
    )


def latin_locale(world: World) -> Seen:
    """A locale of ISO-8859-1: search, recommend, and a finished run in MLflow."""
    variables = _latin(world)
    if variables is None:
        return Seen("runs", "the locale cannot be made here", None)
    ended = world.search(*inputs(world), variables=variables)
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    shown = world.paretune("recommend", "--home", world.home, variables=variables)
    states = [run.info.status for run in _runs(world.home)]
    return (
        Seen.runs(ended)
        .also(f"recommend exit {shown.code}", shown.code == 0 and "Traceback" not in shown.text)
        .also(
            f"{len(states)} runs in MLflow, {states.count('RUNNING')} of them RUNNING",
            len(states) > 1 and "RUNNING" not in states,
        )
    )


def _latin(world: World) -> dict[str, str] | None:
    if shutil.which("localedef") is None:
        return None
    folder = world.folder / "locales"
    folder.mkdir()
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / LOCALE)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    return {"LOCPATH": str(folder), "LC_ALL": LOCALE, "LANG": LOCALE, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def _runs(home: Path) -> list[Any]:
    import mlflow

    from paretune.tracking.mlflow.paths import database_uri

    client = mlflow.MlflowClient(database_uri(home))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def renamed_home(world: World) -> Seen:
    """A home that is renamed: `sync` leaves MLflow's artifacts in it, and does not make the old path again."""
    ended = world.search(*inputs(world))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    moved = world.folder / "moved"
    world.home.rename(moved)
    synced = world.paretune("sync", "--home", moved)
    places = [Path(unquote(urlparse(run.info.artifact_uri).path)) for run in _runs(moved)]
    inside = sum(place.is_relative_to(moved) and any(place.rglob("*")) for place in places)
    return Seen(
        "exit 0, artifacts in the renamed home, the old path gone",
        f"exit {synced.code}, {inside} of {len(places)} runs' artifacts inside, old path {'there' if world.home.exists() else 'gone'}",
        synced.code == 0 and 0 < inside == len(places) and not world.home.exists(),
    )


def percent_in_home(world: World) -> Seen:
    """A home called feature%2Flogin: `sync` works, in a moment."""
    home = world.folder / "feature%2Flogin"
    ended = world.search(*inputs(world), home=home)
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    synced = world.paretune("sync", "--home", home)
    return Seen(
        "exit 0 within 30 s", f"exit {synced.code} after {synced.seconds:.0f} s: {synced.tail(100)}",
        synced.code == 0 and synced.seconds < 30,
    )  # fmt: skip


def brackets_in_home(world: World) -> Seen:
    """A home called `runs [best]` is printed as it is."""
    home = world.folder / "runs [best]"
    ended = world.search(*inputs(world), home=home)
    return Seen.runs(ended).also(
        f"printed {'whole' if 'runs [best]' in ended.text else 'with a hole'}", "runs [best]" in ended.text
    )


def narrow_terminal(world: World) -> Seen:
    """`front` in 80 columns: every number whole, what is left out is said."""
    ended = world.search(*inputs(world))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    shown = world.paretune("front", "--home", world.home, variables={"COLUMNS": "80"})
    lines = shown.text.splitlines()
    cut = re.findall(r"\S*\d\S*…", shown.text)
    widest = max(map(len, lines), default=0)
    return Seen(
        "no number cut, at most 80 columns", f"cut: {cut}, widest line {widest}",
        shown.code == 0 and not cut and widest <= 80,
    )  # fmt: skip


def reason_at_the_end(world: World) -> Seen:
    """A search whose disk fills says why it ended, and what to do."""
    if not have("mount"):
        return Seen("exit 5, reason and remedy", "needs root", None)
    home = world.folder / "small"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(home)], capture_output=True, check=False
    )
    if mounted.returncode:
        return Seen("exit 5, reason and remedy", "no tmpfs can be mounted here", None)
    try:
        ended = world.search(*inputs(world), home=home)
    finally:
        subprocess.run(["umount", "-l", str(home)], check=False)
    last = ended.err[-800:]
    return Seen(
        "exit 5, reason and remedy", f"exit {ended.code}: {ended.tail()}",
        ended.code == 5 and ("disk" in last or "space" in last) and "Traceback" not in last,
    )  # fmt: skip


def pasted_commands(world: World) -> Seen:
    """What a search prints can be pasted: every command names the home, and runs."""
    ended = world.search(*inputs(world))
    if ended.code not in (0, 3):
        return Seen.runs(ended)
    printed = re.findall(
        r"(?:^|\s)(?:\S*/)?paretune ((?:ui|resume|recommend|front|status|report)\b[^\n`]*)", ended.text
    )
    seen = []
    for line in printed:
        arguments = shlex.split(line)
        seen.append("--home" in arguments)
        if arguments[0] not in ("ui", "resume"):
            seen.append(world.paretune(*arguments).code == 0)
    return Seen("all with --home, all run", f"{printed}: {seen}", bool(printed) and all(seen))


ROWS = (
    Row(8, "a TMPDIR of 70 characters", long_temporary_folder),
    Row(9, "a user without entry, HOME=/", user_without_entry),
    Row(10, "a locale of ISO-8859-1", latin_locale),
    Row(11, "a renamed home", renamed_home),
    Row(12, "a home called feature%2Flogin", percent_in_home),
    Row(17, "a home called runs [best]", brackets_in_home),
    Row(20, "the front in 80 columns", narrow_terminal),
    Row(21, "weights that may not be read", unreadable_weights),
    Row(22, "a search that ends with 5", reason_at_the_end),
    Row(23, "printed commands", pasted_commands),
)
