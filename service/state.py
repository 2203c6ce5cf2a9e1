"""What every part of the service shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from paretune.service.data import Studies
from paretune.service.queue import Queue


@dataclass(frozen=True)
class Service:
    """`token` is what clients and browsers must know; `allowed_hosts` are further names under which the service answers;
    `mlflow_url` is where MLflow's page is, if it is served."""

    home: Path
    studies: Studies
    queue: Queue
    token: str
    allowed_hosts: frozenset[str] = field(default_factory=frozenset)
    mlflow_url: str | None = None
