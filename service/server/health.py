"""The container's health check: `python -m paretune.service.server.health [PORT]` asks as a client from outside would.

That is at the container's own address, not its loopback, and by the name that a published port has (localhost): a service that
answers only itself is not healthy. Exit status 0, or 1 with the reason.
"""

from __future__ import annotations

import http.client
import socket
import sys

TIMEOUT_S = 4.0


def problem_of(port: int, name: str = "localhost") -> str:
    """What is wrong with the service on `port` of this machine's own address; empty if it answers by `name`."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"  # a host's network without a name of its own
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/v1/health", headers={"Host": f"{name}:{port}"})
        answer = connection.getresponse()
        told = answer.read(1000).decode("utf8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return f"{address}:{port} does not answer: {error}"
    finally:
        connection.close()
    return "" if answer.status == 200 else f"{address}:{port} answers {answer.status}: {told}"


def main() -> int:
    """Print what is wrong, if anything, and return the exit status."""
    problem = problem_of(int(sys.argv[1]) if len(sys.argv) > 1 else 8765)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
