"""One request to an agent at a time, repeated while it does not answer, within bounds. Every request of the API may be repeated."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from paretune.common.errors import EnvironmentProblem, UsageError

URL = re.compile(r"(https?)://([A-Za-z0-9.-]+):([0-9]{1,5})/?")
MOST_ANSWER = 1 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 3.0


class AgentGone(EnvironmentProblem):
    """The agent does not answer any more; the measurement can be tried again later, or left predicted."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `answer`: of one request; `patience`: how long an agent may be away before it is called gone; `job`: of one
    measurement, waiting in its queue included; `poll`: between two looks at a job (each costs the measured machine a little)."""

    answer: float = 20.0
    patience: float = 90.0
    job: float = 240.0  # less than a worker has for a step of the fit
    poll: float = 1.0


@dataclass(frozen=True)
class Answer:
    """An agent's answer: `status` is HTTP's, `told` the JSON object in the body, empty without one."""

    status: int
    told: dict[str, Any]


class Wire:
    """Requests to `url` with `token`. Raises UsageError for a malformed URL. Redirects are never followed."""

    def __init__(self, url: str, token: str, timeouts: Timeouts, sleep: Callable[[float], None] = time.sleep) -> None:
        match = URL.fullmatch(url)
        if match is None or not 0 < int(match[3]) < 65536:
            raise UsageError(
                f"an agent's URL must be http://HOST:PORT or https://HOST:PORT, but got {url!r}", "correct it"
            )
        self.url, self.timeouts, self.token, self._sleep = url.rstrip("/"), timeouts, token, sleep
        self._scheme, self._host, self._port = match[1], match[2], int(match[3])

    def ask(self, method: str, path: str, data: dict[str, Any] | None = None, file: Path | None = None) -> Answer:
        """Send JSON `data` or a `file`; asks again after refused or broken connections and 429, 500, 502, 503, 504.

        Raises AgentGone once `timeouts.patience` is over, UsageError for 401 and 403.
        """
        deadline, pause = time.monotonic() + self.timeouts.patience, FIRST_PAUSE_S
        while True:
            try:
                answer = self._once(method, path, data, file)
                if answer.status not in (429, 500, 502, 503, 504):
                    return self._known(answer)
                reason = f"it says {answer.status} {answer.told.get('error', '')}"
            except ssl.SSLCertVerificationError as error:
                raise UsageError(
                    f"the certificate of {self.url} cannot be trusted: {error.verify_message}", "mend it"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if time.monotonic() + pause > deadline:
                raise AgentGone(
                    f"no agent answers at {self.url}: {reason}",
                    "start `paretune agent` there, then run the same command again",
                )
            self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _known(self, answer: Answer) -> Answer:
        if answer.status in (401, 403):
            raise UsageError(
                f"the agent at {self.url} refuses: {answer.told.get('error', answer.status)}",
                "give its token in PARETUNE_AGENT_TOKEN or <home>/agent/token, and allow its name there with --allow-host",
            )
        return answer

    def _once(self, method: str, path: str, data: dict[str, Any] | None, file: Path | None) -> Answer:
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeouts.answer)
        try:
            if file is not None:
                with file.open("rb") as stream:
                    _send(
                        connection, method, path, self._headers("application/octet-stream", file.stat().st_size), stream
                    )
            else:
                body = None if data is None else json.dumps(data).encode()
                headers = self._headers("application/json", len(body)) if body is not None else self._headers()
                _send(connection, method, path, headers, body)
            return _answer_of(connection.getresponse())
        finally:
            connection.close()

    def _headers(self, kind: str = "", length: int = 0) -> dict[str, str]:
        body = {"Content-Type": kind, "Content-Length": str(length)} if kind else {}
        return {"Authorization": f"Bearer {self.token}", **body}


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes | IO[bytes] | None,
) -> None:
    """Send a request. An agent that refuses an upload may close its side before the end: then its answer is what counts."""
    try:
        connection.request(method, path, body, headers)
    except (BrokenPipeError, ConnectionResetError):
        if connection.sock is None or body is None:
            raise


def _answer_of(response: http.client.HTTPResponse) -> Answer:
    data = response.read(MOST_ANSWER + 1)
    if len(data) > MOST_ANSWER:
        raise http.client.HTTPException(f"it answers with more than {MOST_ANSWER:,} bytes")
    try:
        told = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        raise http.client.HTTPException("what listens there does not answer as an agent") from None
    if not isinstance(told, dict):
        raise http.client.HTTPException("what listens there does not answer as an agent")
    return Answer(response.status, told)
