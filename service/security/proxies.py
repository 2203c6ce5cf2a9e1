"""What a trusted proxy says of its client. Anybody can send these headers, so they count on a proxy's own connections only."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Collection

from paretune.common.agent_access import plain_address
from paretune.common.errors import UsageError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MOST_HOPS = 32


def networks(given: Collection[str]) -> tuple[Network, ...]:
    """The addresses and networks of --trusted-proxy. Raises UsageError for what is none, and for all addresses at once."""
    found = []
    for text in given:
        try:
            network = ipaddress.ip_network(text.strip(), strict=False)
        except ValueError:
            raise UsageError(
                f"--trusted-proxy must be an address or a network such as 172.17.0.0/16, but got {text!r}",
                "give the address that the proxy's connections come from",
            ) from None
        if network.prefixlen == 0:
            raise UsageError(f"--trusted-proxy must not be every address, but got {text!r}", "give the proxy's address")
        found.append(network)
    return tuple(found)


def is_in(address: str, proxies: Collection[Network]) -> bool:
    """Whether an address is one of the networks'."""
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(plain_address(address))
        return any(found in network for network in proxies)
    return False


def forwarded_client(peer: str, headers: list[str], is_proxy: Callable[[str], bool]) -> str:
    """The client's address of X-Forwarded-For: the last one that is no trusted proxy, as those before it are the client's own
    words. The `peer` itself where there is none."""
    client = peer
    for entry in reversed(",".join(headers).split(",")[-MOST_HOPS:]):
        address = _address(entry.strip())
        if address is None:
            return client
        client = address
        if not is_proxy(address):
            return client
    return client


def forwarded_scheme(headers: list[str]) -> str | None:
    """http or https of X-Forwarded-Proto, None where it says neither. Of several, the last is this proxy's own."""
    scheme = ",".join(headers).rpartition(",")[2].strip().lower()
    return scheme if scheme in ("http", "https") else None


def _address(entry: str) -> str | None:
    """An address of X-Forwarded-For, which some proxies write with a port."""
    bare = entry.strip('"')
    if bare.startswith("["):
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:
        bare = bare.partition(":")[0]
    try:
        ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    return plain_address(bare)
