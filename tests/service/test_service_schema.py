"""schemathesis over the OpenAPI description with all checks: no 5xx, only documented statuses and bodies, bad data refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.security.guard import Buckets
from paretune.service.server.app import create_app
from paretune.service.state import Service

TOKEN = "schema-token-schema-token"
EXAMPLES = 12
# What a schema cannot say: settings that contradict each other, names that are not there, too many to compare, verbs in a state.
FURTHER_RULES = (
    "/v1/plan",
    "/v1/studies",
    "/v1/compare",
    "/v1/studies/{study}/recommendation",
    "/v1/studies/{study}/front",
)


@pytest.fixture(scope="module")
def served(simulated_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    home = Path(shutil.copytree(simulated_home, tmp_path_factory.mktemp("schema") / "home"))
    queue = Queue(home)
    app = create_app(Service(home, Studies(home), queue, TOKEN, frozenset({"localhost", "testserver"})))
    app.requests, app.logins = Buckets(1e9, 1e9), Buckets(1e9, 1e9)  # the test is one client with many requests
    yield app
    queue.close()


@pytest.fixture(scope="module")
def described(served: Any) -> Any:
    return schemathesis.openapi.from_asgi(
        "/v1/openapi.json", served, headers={"Authorization": f"Bearer {TOKEN}", "Host": "localhost"}
    )


def operations() -> list[tuple[str, str]]:
    """(path, method) of every route that is described."""
    nothing: Any = None
    guard: Any = create_app(Service(Path(), nothing, nothing, TOKEN))
    paths = guard.app.openapi()["paths"]
    return [(path, method) for path, found in paths.items() for method in found]


def test_there_are_routes() -> None:
    assert len(operations()) > 20


@pytest.mark.parametrize(("path", "method"), operations())
def test_every_route_keeps_its_description(described: Any, path: str, method: str) -> None:
    @given(case=described[path][method].as_strategy())
    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    def check(case: Any) -> None:
        excluded = [positive_data_acceptance] if path in FURTHER_RULES else []
        case.call_and_validate(
            excluded_checks=excluded, headers={"Authorization": f"Bearer {TOKEN}", "Host": "localhost"}
        )

    check()
