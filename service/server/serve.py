"""`paretune serve`: token, queue, supervisor, HTTP server and, if wanted, MLflow's page, from start to orderly end."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.common import agent_access
from paretune.common.command_line import pasted
from paretune.common.errors import EnvironmentProblem, ParetuneError, UsageError
from paretune.common.files import disk_problem, require_folder
from paretune.search.study.database import is_taken
from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.queue.supervisor import TOKEN, Supervisor
from paretune.service.security.proxies import Network
from paretune.service.state import Service
from paretune.tracking.mlflow.addresses import start_page
from paretune.tracking.mlflow.app import PREFIX

if TYPE_CHECKING:
    import uvicorn

FOLDER = "service"
BACKLOG = 256


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
    proxies: tuple[Network, ...] = ()


def run_service(home: Path, settings: Settings) -> int:
    """Serve until Ctrl-C or SIGTERM; searches rest then, and the next service goes on with them. Returns 0.

    Raises UsageError for a host that others can reach without a token of the operator's own, EnvironmentProblem for a port or
    folder that cannot be had, or a second service on the home.
    """
    from paretune.service.security.deadlines import server_of
    from paretune.service.server.app import create_app

    token = token_for(home, settings)
    require_folder(home)
    with contextlib.ExitStack() as stack:
        queue = _queue_of(home)
        stack.callback(queue.close)
        listening = bind(settings.host, settings.port)
        stack.callback(listening.close)
        mlflow = _mlflow_of(home, stack) if settings.mlflow else None
        mlflow_url = None if mlflow is None else start_page(home, f"{PREFIX}/")
        fresh = token is None
        token = token or agent_access.write_token(home / FOLDER)
        service = Service(
            home, Studies(home), queue, token, settings.allowed_hosts, mlflow_url, mlflow, proxies=settings.proxies
        )
        if settings.searches:
            supervisor = Supervisor(queue, at_once=settings.searches, threads=settings.threads)
            supervisor.start()
            stack.callback(supervisor.stop)
        _tell(settings.host, listening.getsockname()[1], token if fresh else None, home, mlflow_url)
        server = server_of(create_app(service), service.is_proxy)
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


def token_for(home: Path, settings: Settings) -> str | None:
    """The token of PARETUNE_TOKEN, else of <home>/service/token; None where one is to be made once the service has its port.

    Raises UsageError for one that is too short, or if others can reach the host and there is none yet; EnvironmentProblem for a
    file that others can read.
    """
    if settings.new_token:
        return None
    known = agent_access.kept_token(TOKEN, home / FOLDER / "token")
    if known is None and not agent_access.is_loopback(settings.host):
        raise UsageError(
            f"{settings.host or 'every address'} can be reached from elsewhere, so the service needs a token of yours",
            f"set {TOKEN}, or make one with `{pasted('serve', '--new-token', home=home)}`",
        )
    return known


def _queue_of(home: Path) -> Queue:
    """The home's queue, which one service at a time has. Raises EnvironmentProblem."""
    try:
        return Queue(home)
    except OSError as error:
        raise disk_problem(error) or EnvironmentProblem(
            f"{home / FOLDER} cannot be written: {error.strerror}", "make it writable, or name another --home"
        ) from None
    except EnvironmentProblem:
        if not is_taken(home / FOLDER):
            raise
        holder = (home / FOLDER / "lock").read_text("utf8", "replace").strip() or "another process"
        raise EnvironmentProblem(
            f"another service runs on {home} ({holder})", "end it with Ctrl-C there, or name another --home"
        ) from None


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
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise EnvironmentProblem(
            f"{host} port {port} cannot be opened: {error.strerror}", "choose another --port"
        ) from None
    return listening


def _mlflow_of(home: Path, stack: contextlib.ExitStack) -> Path | None:
    """The socket of MLflow's page over `home`; None, and a word, if it does not come up: the service does not need it."""
    from paretune.service.server.mlflow_page import mlflow_process

    try:
        return stack.enter_context(mlflow_process(home))
    except ParetuneError as error:
        print(f"note: MLflow is not served: {error.problem}; {error.remedy}", file=sys.stderr)
        return None


def _tell(host: str, port: int, token: str | None, home: Path, mlflow: str | None) -> None:
    """Where to look; the token only when it is new, as part of an address that no log of a server ever sees."""
    address = agent_access.url_to_open(host, port)
    if token is not None:
        print(f"open {address}/login#token={token}", file=sys.stderr)
        print(f"(the token is shown once and kept in {home / FOLDER / 'token'})", file=sys.stderr)
    else:
        print(f"open {address}/login; the token is in {home / FOLDER / 'token'} or {TOKEN}", file=sys.stderr)
    if mlflow is not None:
        print(f"MLflow: {address}{mlflow}, behind the same login", file=sys.stderr)
    print(address, flush=True)
