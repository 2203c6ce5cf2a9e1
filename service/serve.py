"""`paretune serve`: token, queue, supervisor, HTTP server and, if wanted, MLflow's page, from start to orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.hardware_profiles.command_line import pasted
from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError
from paretune.objectives import agent_access
from paretune.service.data import Studies
from paretune.service.queue import Queue
from paretune.service.state import Service
from paretune.service.supervisor import TOKEN, Supervisor

if TYPE_CHECKING:
    import uvicorn

FOLDER = "service"
MOST_CONNECTIONS = 256
GRACE_S = 5


@dataclass(frozen=True)
class Settings:
    """As the options of `paretune serve` say. `searches` 0: nothing is started, only shown."""

    host: str = "127.0.0.1"
    port: int = 8765
    allowed_hosts: frozenset[str] = frozenset()
    searches: int = 1
    threads: int = 1
    mlflow: bool = False
    new_token: bool = False


def run_service(home: Path, settings: Settings) -> int:
    """Serve until Ctrl-C or SIGTERM; searches rest then, and the next service goes on with them. Returns 0.

    Raises UsageError for a host that others can reach without a token of the operator's own, EnvironmentProblem for a port or
    folder that cannot be had, or a second service on the home.
    """
    import uvicorn

    from paretune.service.app import create_app

    token, fresh = token_for(home, settings)
    listening = bind(settings.host, settings.port)
    port = listening.getsockname()[1]
    with contextlib.ExitStack() as stack:
        stack.callback(listening.close)
        queue = Queue(home)
        stack.callback(queue.close)
        mlflow = stack.enter_context(mlflow_beside(home, port + 1)) if settings.mlflow else None
        service = Service(home, Studies(home), queue, token, settings.allowed_hosts, mlflow)
        if settings.searches:
            supervisor = Supervisor(queue, at_once=settings.searches, threads=settings.threads)
            supervisor.start()
            stack.callback(supervisor.stop)
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=GRACE_S,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=32 * 1024,
        )
        _tell(settings.host, port, token if fresh else None, home, mlflow)
        server = uvicorn.Server(config)
        server.capture_signals = lambda: ended_by_signals(server)  # type: ignore[method-assign]
        server.run(sockets=[listening])
        print("the service ends; running searches rest and go on with the next one", file=sys.stderr, flush=True)
    return 0


@contextlib.contextmanager
def ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the server. Its own handlers would raise the signal again before the searches were asked to rest."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, server.handle_exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def token_for(home: Path, settings: Settings) -> tuple[str, bool]:
    """(the token, whether it is new): of PARETUNE_TOKEN, else of <home>/service/token, else made there with mode 0600.

    Raises UsageError for one that is too short, or if others can reach the host and there is none yet; EnvironmentProblem for a
    file that others can read.
    """
    folder = home / FOLDER
    known = None if settings.new_token else agent_access.kept_token(TOKEN, folder / "token")
    if known is not None:
        return known, False
    if not agent_access.is_loopback(settings.host) and not settings.new_token:
        raise UsageError(
            f"{settings.host} can be reached from elsewhere, so the service needs a token of yours",
            f"set {TOKEN}, or make one with `{pasted('serve', '--new-token', home=home)}`",
        )
    return agent_access.write_token(folder), True


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError for an address that is none, EnvironmentProblem if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host must be an address of this machine, but got {host!r}: {error}", "try 127.0.0.1"
        ) from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(MOST_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise EnvironmentProblem(
            f"{host} port {port} cannot be opened: {error.strerror}", "choose another --port"
        ) from None
    return listening


@contextlib.contextmanager
def mlflow_beside(home: Path, port: int) -> Iterator[str]:
    """MLflow's page on 127.0.0.1:`port`, ended with the service; its address."""
    from paretune.tracking.ui import QUIET, end_server, server_command, start_page

    server = subprocess.Popen(
        server_command(home, port), env=os.environ | QUIET, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        yield start_page(home, port)
    finally:
        end_server(server)


def _tell(host: str, port: int, token: str | None, home: Path, mlflow: str | None) -> None:
    """Where to look; the token only when it is new, as part of an address that no log of a server ever sees."""
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    if token is not None:
        print(f"open {address}/login#token={token}", file=sys.stderr)
        print(f"(the token is shown once and kept in {home / FOLDER / 'token'})", file=sys.stderr)
    else:
        print(f"open {address}/login; the token is in {home / FOLDER / 'token'} or {TOKEN}", file=sys.stderr)
    if mlflow is not None:
        print(f"MLflow: {mlflow}", file=sys.stderr)
    print(address, flush=True)
