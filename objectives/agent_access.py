"""Who may talk to an agent: its token, and the Host names under which it answers.

The Host check is what stops DNS rebinding (CVE-2025-62593 took a laptop through a Ray dashboard that way): a page of another
site reaches the agent's address, but under a name of its own. So an address is accepted only as the literal one that the
connection came to, and names only where they are allowed.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import shlex
import stat
from collections.abc import Collection
from pathlib import Path

from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.files import sync_folder

TOKEN = "PARETUNE_AGENT_TOKEN"
SHORTEST, LONGEST = 16, 256


def given_token(home: Path, server: str = "") -> str | None:
    """The token of the environment, else of `<home>/agent/<server>.token` (host_port); for this machine's own agent also of
    `<home>/agent/token`, which no other server is told. None if there is none.

    Raises UsageError for a token that is too short or has other than printable ASCII, EnvironmentProblem for a file that
    others can read.
    """
    folder = home / "agent"
    own = not server or is_loopback(server.rpartition("_")[0])
    return kept_token(TOKEN, *[folder / f"{server}.token"] * bool(server), *[folder / "token"] * own)


def kept_token(variable: str, *paths: Path) -> str | None:
    """The token of an environment variable, else of the first file that exists; None if there is none. Raises as `given_token`."""
    if variable in os.environ:
        return _checked(os.environ[variable], f"the environment variable {variable}")
    for path in paths:
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                raise EnvironmentProblem(
                    f"{path} must be readable by you alone, but its mode is {mode:04o}",
                    f"run `chmod 600 {shlex.quote(str(path))}`",
                )
            return _checked(path.read_text("ascii", "replace").strip(), str(path))
    return None


def new_token(home: Path) -> str:
    """A fresh token of 256 bits, kept in `<home>/agent/token` with mode 0600 in place of the one before."""
    return write_token(home / "agent")


def write_token(folder: Path) -> str:
    """A fresh token of 256 bits, kept in `<folder>/token` with mode 0600 in place of the one before."""
    token = secrets.token_urlsafe(32)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / f".token.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "token")
    sync_folder(folder)
    return token


def _checked(token: str, where: str) -> str:
    if not SHORTEST <= len(token) <= LONGEST or not all(33 <= ord(c) <= 126 for c in token):
        raise UsageError(
            f"a token has {SHORTEST} to {LONGEST} printable ASCII characters without spaces, but the one of {where} "
            f"has {len(token)} characters or others among them",
            "let `--new-token` make one",
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether binding to `host` keeps the agent on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_matches(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries the token; takes the same time wherever it differs."""
    given = (header or "").encode("latin-1", "replace")
    return hmac.compare_digest(given, b"Bearer " + token.encode())


def host_is_known(header: str | None, address: str, port: int, allowed: Collection[str] = ()) -> bool:
    """Whether a Host header is the `address:port` that the connection came to, or one of the `allowed` names (with that port,
    or without one, as behind a proxy)."""
    own = {address, "localhost"} if is_loopback(address) else {address}
    return (header or "").lower() in {*(f"{name}:{port}" for name in own.union(allowed)), *allowed}
