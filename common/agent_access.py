"""Who may talk to an agent: its token, and the Host names under which it answers.

The Host check is what stops DNS rebinding (CVE-2025-62593 took a laptop through a Ray dashboard that way): a page of another
site reaches the agent's address, but under a name of its own. So an address is accepted only as the literal one that the
connection came to, and names only where they are allowed.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import re
import secrets
import shlex
import stat
from collections.abc import Collection
from pathlib import Path

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.files import sync_folder

TOKEN = "PARETUNE_AGENT_TOKEN"
TOKEN_FILE = "PARETUNE_AGENT_TOKEN_FILE"  # where a search puts it for its workers
SHORTEST, LONGEST = 16, 256


def given_token(home: Path, server: str = "") -> str | None:
    """The token of the environment, else of the file that it names, else of `<home>/agent/<server>.token` (host_port); for this
    machine's own agent also of `<home>/agent/token`, which no other server is told. None if there is none.

    Raises UsageError for a token that is too short or has other than printable ASCII, EnvironmentProblem for a file that
    others can read.
    """
    folder = home / "agent"
    own = not server or is_loopback(server.rpartition("_")[0])
    named = [Path(os.environ[TOKEN_FILE])] if TOKEN_FILE in os.environ else []
    return kept_token(TOKEN, *named, *[folder / f"{server}.token"] * bool(server), *[folder / "token"] * own)


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
            try:
                return _checked(path.read_text("ascii", "replace").strip(), str(path))
            except OSError as error:
                raise EnvironmentProblem(
                    f"{path} cannot be read: {error.strerror}", f"let it be a file of yours, or set {variable}"
                ) from None
    return None


def write_token(folder: Path, token: str | None = None) -> str:
    """A fresh token of 256 bits, or `token`, kept in `<folder>/token` with mode 0600 in place of the one before."""
    token = token or fresh_token()
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


def fresh_token() -> str:
    """A token of 256 bits."""
    return secrets.token_urlsafe(32)


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
        return ipaddress.ip_address(plain_address(host)).is_loopback
    except ValueError:
        return False


def token_matches(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries the token; takes the same time wherever it differs."""
    given = (header or "").encode("latin-1", "replace")
    return hmac.compare_digest(given, b"Bearer " + token.encode())


def plain_address(address: str) -> str:
    """Return the address without its zone; an IPv4 address mapped into IPv6 (`::ffff:…`) is returned as IPv4."""
    address = address.partition("%")[0]
    with contextlib.suppress(ValueError):
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
        return address if mapped is None else str(mapped)
    return address


def in_url(host: str) -> str:
    """An address or name as it stands in a URL or a Host header: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def url_to_open(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a server that listens on `host`; loopback if it is every address."""
    return f"http://{in_url({'0.0.0.0': '127.0.0.1', '': '127.0.0.1', '::': '::1'}.get(host, host))}:{port}"


def own_hosts(address: str, port: int) -> set[str]:
    """The Host headers that name the `address` and `port` that a connection came to; clients leave out port 80."""
    address = plain_address(address)
    names = {in_url(address), *["localhost"] * is_loopback(address)}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


def host_is_known(header: str | None, address: str, port: int, allowed: Collection[str] = ()) -> bool:
    """Whether a Host header is the `address:port` that the connection came to, or one of the `allowed` names: a name with a
    port allows that port, one without allows any, as a proxy or a published port has one of its own."""
    given = (header or "").lower()
    name, colon, number = given.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", number):
        name = given
    return bool(given) and (given in own_hosts(address, port) or given in allowed or name in allowed)


def host_problem(header: str | None, allowing: str) -> tuple[str, str]:
    """What is wrong with a Host header and what to do; `allowing` is how names are allowed, such as "start with --allow-host"."""
    given = header or ""
    rule = "the Host header must be this server's own address and port, or a name given by --allow-host"
    if not given:
        return f"{rule}, but there is none", "send a Host header"
    name = given if given.endswith("]") else given.rpartition(":")[0] or given
    named = name if re.fullmatch(r"[A-Za-z0-9._\-\[\]:]{1,100}", name) else "NAME"
    return f"{rule}, but it is {given[:100]!r}", f"{allowing} {named} if clients may call it by this name"


def allowed_names(given: Collection[str]) -> frozenset[str]:
    """The names of --allow-host as Host headers have them. Raises UsageError for what can be none."""
    return frozenset(_allowed_name(name.strip().lower()) for name in given)


def _allowed_name(name: str) -> str:
    with contextlib.suppress(ValueError):
        return in_url(str(ipaddress.ip_address(name)))
    host, port = re.fullmatch(r"(.*?)(?::([0-9]+))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", host) and 0 < int(port or 1) <= 65535:
        return name
    raise UsageError(
        f"--allow-host must be a name or name:port, such as models.example.org, but got {name!r}", "leave out https://"
    )
