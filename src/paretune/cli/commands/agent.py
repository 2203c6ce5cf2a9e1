"""The command that measures for other machines."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Annotated, Any

import typer

from paretune.cli.terminal.console import print_json, print_text, talk
from paretune.cli.terminal.options import HOME, Home, Json, size_in_bytes
from paretune.common.errors import UsageError


def agent(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any address but loopback needs an existing token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7411,
    profile: Annotated[str, typer.Option(help="This machine as a target: a name or a YAML file.")] = "local-cpu",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Further name that clients use for this machine.")
    ] = None,
    max_disk: Annotated[str, typer.Option(help="Disk space for uploaded files such as 4GB; at least 1MB.")] = "4GB",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that each process of a job may allocate such as 8GB; two engines run at a time. "
            "By default 40 % of this machine's memory."
        ),
    ] = None,
    new_token: Annotated[bool, typer.Option("--new-token", help="Make a new token, print it and stop.")] = False,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Measure artifacts for a search on another machine, until Ctrl-C."""
    from paretune.common.agent_access import allowed_names, url_to_open
    from paretune.common.files import require_folder
    from paretune.hardware_profiles.profile import load_profile
    from paretune.objectives.agent import start as agent_start
    from paretune.objectives.agent.jobs import LEAST_MEMORY_BYTES

    folder = home.resolve()
    disk = _size(max_disk, "--max-disk", 10**6)
    memory = None if max_memory is None else _size(max_memory, "--max-memory", LEAST_MEMORY_BYTES)
    names = allowed_names(allow_host or ())
    if new_token:
        print_text(agent_start.new_token(folder))
        return
    require_folder(folder)
    found = load_profile(profile, folder)
    token = agent_start.token_for(host, folder)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _end)
    with (
        contextlib.suppress(KeyboardInterrupt),
        agent_start.serving(folder, found, token, host, port, names, disk, memory) as server,
    ):
        address = url_to_open(host, int(server.server_address[1]))
        if token is None:
            kept = folder / "agent" / "token"
            talk.print(f"token, shown once and kept in {kept}: {server.agent.token}", soft_wrap=True, markup=False)
        talk.print("Ctrl-C ends it; whatever else runs on this machine disturbs what it measures", soft_wrap=True)
        print_json({"url": address}) if json else print_text(address)
        sys.stdout.flush()
        server.serve_forever()


def _size(text: str, option: str, least: int) -> int:
    """Bytes of a size. Raises UsageError below `least`."""
    value = int(size_in_bytes(text, option) or 0)
    if value < least:
        raise UsageError(
            f"{option} must be at least {least / 1e6:,.0f} MB, but got {text!r}, which is {value:,} bytes",
            "write a number and kB, MB or GB",
        )
    return value


def _end(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt
