"""What every part of the service shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.security.proxies import Network, is_in
from paretune.service.security.sessions import Sessions


@dataclass(frozen=True)
class Service:
    """`token` is what clients and browsers must know; `allowed_hosts` are further names under which the service answers;
    `mlflow_url` is where MLflow's page is below the service, if it is served, and `mlflow_socket` where its process listens;
    `sessions` are the browsers that are logged in, `proxies` the networks whose word for a client's address and scheme is taken."""

    home: Path
    studies: Studies
    queue: Queue
    token: str
    allowed_hosts: frozenset[str] = field(default_factory=frozenset)
    mlflow_url: str | None = None
    mlflow_socket: Path | None = None
    sessions: Sessions = field(default_factory=Sessions)
    proxies: tuple[Network, ...] = ()

    def is_proxy(self, address: str) -> bool:
        """Whether connections of this address are a trusted proxy's."""
        return is_in(address, self.proxies)
