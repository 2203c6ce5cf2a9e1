"""Telling somebody that a search has ended or died: a command of theirs, or a webhook.

    command   no shell; the event as JSON on its standard input, its main words in its environment
    url       https only; no redirect is followed; the name is resolved once, every address is checked, and the connection goes to
              the checked one (MLflow's first fix of CVE-2026-2393 checked the name once and connected by it again: rebinding, redirects
              and CVE-2026-64849 followed); the body is signed with the secret

A small process beside the search (watch.py) sends the event, so that a slow receiver does not hold up the search, and a
search that is killed is still told of.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import ipaddress
import json
import os
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.yaml_file import load_model

FILE = "notify.yaml"
PREFIX = "PARETUNE_NOTIFY_"
COMMAND_S, CONNECT_S = 60.0, 10.0
TRIES, PAUSE_S = 3, 2.0
MOST_ANSWER = 64 * 1024
SIGNATURE = "X-Paretune-Signature"
WORDS = ("study", "event", "state", "exit_code", "report")


class Notify(BaseModel):
    """Whom to tell. `secret` signs webhooks; `allow_private` lets a webhook go to addresses of the own network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str | None = None
    url: str | None = None
    secret: str | None = None
    allow_private: bool = False

    @property
    def is_on(self) -> bool:
        """Whether a command or a webhook is set."""
        return self.command is not None or self.url is not None


class Refused(Exception):
    """The receiver cannot be told: the rule and the value."""


def load_notify(home: Path, command: str | None = None, url: str | None = None) -> Notify:
    """Options before the environment (PARETUNE_NOTIFY_COMMAND, _URL, _SECRET, _ALLOW_PRIVATE) before <home>/notify.yaml.

    Raises UsageError for settings that cannot work, EnvironmentProblem for a file with a secret that others can read.
    """
    file = home / FILE
    kept = load_model(file, Notify) if file.is_file() else Notify()
    if kept.secret is not None and (mode := stat.S_IMODE(file.stat().st_mode)) & 0o077:
        raise EnvironmentProblem(
            f"{file} has a secret and must be readable by you alone, but its mode is {mode:04o}",
            f"run `chmod 600 {shlex.quote(str(file))}`",
        )
    known = {name: os.environ.get(PREFIX + name.upper()) for name in ("command", "url", "secret")}
    given = {"command": command, "url": url}
    private = os.environ.get(f"{PREFIX}ALLOW_PRIVATE", "").lower() in ("1", "true", "yes")
    values = {
        name: next((v for v in (given.get(name), known[name]) if v is not None), getattr(kept, name)) for name in known
    }
    found = Notify(**values, allow_private=private or kept.allow_private)
    _check(found)
    return found


def _check(found: Notify) -> None:
    """Raises UsageError."""
    if found.command is not None:
        try:
            words = shlex.split(found.command)
        except ValueError as error:
            raise UsageError(f"--notify-command cannot be split into words: {error}", "close its quotes") from None
        if not words:
            raise UsageError("--notify-command must name a program, but is empty", "name one, or leave it out")
    if found.url is not None:
        try:
            _parts(found.url)
        except Refused as refused:
            raise UsageError(f"--notify-url: {refused}", "give an address such as https://example.org/hook") from None


def tell(notify: Notify, event: Mapping[str, Any]) -> list[str]:
    """Send an event every way that is set; problems in words, none raised."""
    problems = []
    if notify.command is not None:
        problems += run_command(notify.command, event)
    if notify.url is not None:
        problems += _try_often(notify, event)
    return problems


def run_command(command: str, event: Mapping[str, Any], seconds: float = COMMAND_S) -> list[str]:
    """Run a program with the event on its standard input; it and what it has started are ended after `seconds`."""
    words = {f"PARETUNE_{name.upper()}": str(event.get(name, "")) for name in WORDS}
    hidden = {name: value for name, value in os.environ.items() if "TOKEN" not in name and "SECRET" not in name}
    try:
        process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**hidden, **words},
            start_new_session=True,
        )
    except OSError as error:
        return [f"the command {command!r} cannot be started: {error.strerror}"]
    try:
        process.communicate(json.dumps(event).encode(), seconds)
    except subprocess.TimeoutExpired:
        return [f"the command {command!r} was ended after {seconds:.0f} s"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return [f"the command {command!r} ended with {process.returncode}"] if process.returncode else []


def _try_often(notify: Notify, event: Mapping[str, Any]) -> list[str]:
    assert notify.url is not None
    problem = ""
    for turn in range(TRIES):
        try:
            post(notify.url, event, notify.secret, notify.allow_private)
            return []
        except Refused as refused:
            return [f"the webhook was not sent: {refused}"]
        except (OSError, http.client.HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
            time.sleep(PAUSE_S * 2**turn)
    return [f"the webhook was not taken in {TRIES} tries: {problem}"]


def post(url: str, event: Mapping[str, Any], secret: str | None, allow_private: bool) -> None:
    """POST an event once. Raises Refused for an address that may not be told, OSError or HTTPException for one that did not take it."""
    parts = _parts(url)
    host, port = str(parts.hostname), parts.port or 443
    address = resolved(host, port, allow_private)
    body = json.dumps(event).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "paretune"}
    if secret is not None:
        headers[SIGNATURE] = signature(secret, body, int(time.time()))
    context = ssl.create_default_context()
    plain = socket.create_connection((address, port), CONNECT_S)
    with contextlib.closing(http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=context)) as connection:
        try:
            connection.sock = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        connection.request("POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, headers)
        answer = connection.getresponse()
        answer.read(MOST_ANSWER)
    if 300 <= answer.status < 400:
        raise Refused(f"it redirects ({answer.status}), which is not followed")
    if not 200 <= answer.status < 300:
        raise http.client.HTTPException(f"it answered {answer.status}")


def resolved(host: str, port: int, allow_private: bool) -> str:
    """The address to connect to; all of a name's must be allowed. Raises Refused, OSError."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not allow_private and (inside := next((a for a in found if not is_public(a)), None)) is not None:
        raise Refused(f"{host} is {inside}, which is not public; set allow_private if that is meant")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet; one that wraps an IPv4 address is judged by that."""
    known = ipaddress.ip_address(address.partition("%")[0])
    wrapped = getattr(known, "ipv4_mapped", None) or getattr(known, "sixtofour", None)
    known = wrapped or known
    return known.is_global and not known.is_multicast


def signature(secret: str, body: bytes, at: int) -> str:
    """`t=SECONDS,v1=HEX`: HMAC-SHA256 of `SECONDS.BODY`."""
    return f"t={at},v1={hmac.new(secret.encode(), f'{at}.'.encode() + body, hashlib.sha256).hexdigest()}"


def _parts(url: str) -> Any:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Refused(f"{url!r} is no address: {error}") from None
    if parts.scheme != "https" or not parts.hostname or port == 0:
        raise Refused(f"a webhook is an https address, but got {url[:100]!r}")
    if parts.username is not None or parts.password is not None or any(ord(c) < 33 for c in url):
        raise Refused("a webhook's address has neither a user's name nor spaces")
    return parts
