"""Making an agent ready on this machine: its folder, its token, what it tells of itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paretune import __version__
from paretune.hardware_profiles.command_line import pasted
from paretune.hardware_profiles.detect import detect_local, fingerprint, package_version
from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.agent_access import given_token, is_loopback, new_token
from paretune.objectives.agent_jobs import Jobs
from paretune.objectives.agent_order import ENGINES
from paretune.objectives.agent_server import Agent, AgentServer, bind
from paretune.objectives.agent_store import ContentStore

PORT = 7411
MAX_DISK_BYTES = 4 * 2**30


def token_for(host: str, home: Path) -> tuple[str, bool]:
    """The agent's token, and whether it was made just now. Raises UsageError for a foreign `host` without one.

    On loopback the first start makes one; to listen to other machines somebody must have taken care of it before.
    """
    token = given_token(home)
    if token is not None:
        return token, False
    if not is_loopback(host):
        raise UsageError(
            f"an agent that listens on {host} needs a token, but there is none",
            f"run `{pasted('agent', '--new-token', home=home)}` first, or set PARETUNE_AGENT_TOKEN",
        )
    return new_token(home), True


def facts(profile: Profile) -> dict[str, Any]:
    """What health tells of this machine: figures that decide a latency, and the engines that are installed."""
    machine = detect_local()
    engines = [name for name in ENGINES if find_spec(name) is not None]
    return {
        "version": __version__,
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
    token: str,
    host: str = "127.0.0.1",
    port: int = PORT,
    allowed_hosts: Collection[str] = (),
    max_disk_bytes: int = MAX_DISK_BYTES,
) -> Iterator[AgentServer]:
    """A bound server whose jobs end with it. Raises EnvironmentProblem if the port or the home is taken."""
    folder = home / "agent"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(folder):
        jobs = Jobs(store := ContentStore(folder / "files", max_disk_bytes), folder)
        agent = Agent(store, jobs, token, facts(profile), frozenset(name.lower() for name in allowed_hosts))
        try:
            server = bind(host, port, agent)
        except OSError as error:
            jobs.close()
            raise EnvironmentProblem(
                f"the agent cannot listen on {host}:{port}: {error.strerror or error}",
                "choose another --host or --port",
            ) from None
        try:
            yield server
        finally:
            server.server_close()
            jobs.close()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One agent per home: a kernel lock, which a crash releases."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(f"another agent runs on {folder}", "end it, or name another --home") from None
        yield
    finally:
        os.close(handle)
