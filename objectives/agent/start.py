"""Making an agent ready on this machine: its folder, its token, what it tells of itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paretune.common.agent_access import allowed_names, fresh_token, given_token, is_loopback, write_token
from paretune.common.command_line import pasted
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.files import disk_problem, require_folder
from paretune.common.version import VERSION
from paretune.hardware_profiles.detect import detect_local, fingerprint, package_version
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.agent.jobs import Jobs, default_memory_bytes
from paretune.objectives.agent.order import ENGINES
from paretune.objectives.agent.server import Agent, AgentServer, bind
from paretune.objectives.agent.store import ContentStore

PORT = 7411
MAX_DISK_BYTES = 4 * 2**30


def token_for(host: str, home: Path) -> str | None:
    """The agent's token; None on loopback without one: `serving` makes it. Raises UsageError for a foreign `host` without one.

    To listen to other machines somebody must have taken care of it before.
    """
    token = given_token(home)
    if token is None and not is_loopback(host):
        raise UsageError(
            f"an agent that listens on {host or 'every address'} needs a token, but there is none",
            f"run `{pasted('agent', '--new-token', home=home)}` first, or set PARETUNE_AGENT_TOKEN",
        )
    return token


def new_token(home: Path) -> str:
    """A fresh token, kept in `<home>/agent/token` in place of the one before. Raises EnvironmentProblem while an agent runs there,
    which would go on with the old one."""
    with _alone(_folder_of(home)) as folder:
        return write_token(folder)


def _folder_of(home: Path) -> Path:
    require_folder(home)
    folder = home / "agent"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise disk_problem(error) or EnvironmentProblem(
            f"{folder} cannot be made: {error.strerror}", "make it writable, or name another --home"
        ) from None
    return folder


def facts(profile: Profile) -> dict[str, Any]:
    """What health tells of this machine: figures that decide a latency, and the engines that are installed."""
    machine = detect_local()
    engines = [name for name in ENGINES if find_spec(name) is not None]
    return {
        "version": VERSION,
        "fingerprint": fingerprint(),
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_bytes": machine.memory_bytes,
        "engine": profile.engine,
        "engine_version": machine.engine_version,
        "engines": engines,
        "versions": {name: package_version(name) for name in engines},
        "profile": profile.model_dump(mode="json"),
    }


@contextlib.contextmanager
def serving(
    home: Path,
    profile: Profile,
    token: str | None,
    host: str = "127.0.0.1",
    port: int = PORT,
    allowed_hosts: Collection[str] = (),
    max_disk_bytes: int = MAX_DISK_BYTES,
    max_memory_bytes: int | None = None,
) -> Iterator[AgentServer]:
    """A bound server whose jobs end with it. A `token` of None is made anew and kept, once the port is had.

    Raises EnvironmentProblem if the port or the home is taken.
    """
    with _alone(_folder_of(home)) as folder:
        store = ContentStore(folder / "files", max_disk_bytes)
        jobs = Jobs(store, folder, max_memory_bytes=max_memory_bytes or default_memory_bytes())
        told = facts(profile) | {"max_job_memory_bytes": jobs.max_memory_bytes}
        agent = Agent(store, jobs, token or fresh_token(), told, allowed_names(allowed_hosts))
        try:
            server = bind(host, port, agent)
        except OSError as error:
            jobs.close()
            raise EnvironmentProblem(
                f"the agent cannot listen on {host}:{port}: {error.strerror or error}",
                "choose another --host or --port",
            ) from None
        try:
            if token is None:
                write_token(folder, agent.token)
            yield server
        finally:
            server.server_close()
            jobs.close()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder, of which one agent at a time is the owner: a kernel lock, which a crash releases."""
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise disk_problem(error) or EnvironmentProblem(
            f"{folder} cannot be written: {error.strerror}", "make it writable, or name another --home"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(f"another agent runs on {folder}", "end it, or name another --home") from None
        yield folder
    finally:
        os.close(handle)
