"""The command that measures for other machines."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Annotated, Any

import typer

from paretune.cli_options import HOME, Home, Json, size_in_bytes
from paretune.console import print_json, print_text, talk


def agent(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs a token that exists already.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7411,
    profile: Annotated[str, typer.Option(help="This machine's profile: a name or a YAML file.")] = "local-cpu",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that clients call this machine by, beside its address.")
    ] = None,
    max_disk: Annotated[str, typer.Option(help="What uploaded files may take, such as 4GB.")] = "4GB",
    new_token: Annotated[bool, typer.Option("--new-token", help="Make a new token, print it and stop.")] = False,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Measure artifacts for a search on another machine, until Ctrl-C."""
    from paretune.hardware_profiles.profile import load_profile
    from paretune.objectives import agent_access
    from paretune.objectives.agent_start import serving, token_for

    folder = home.resolve()
    if new_token:
        print_text(agent_access.new_token(folder))
        return
    limit = int(size_in_bytes(max_disk, "--max-disk") or 0)
    found = load_profile(profile, folder)
    token, fresh = token_for(host, folder)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _end)
    with (
        contextlib.suppress(KeyboardInterrupt),
        serving(folder, found, token, host, port, allow_host or (), limit) as server,
    ):
        address = f"http://{host}:{server.server_address[1]}"
        if fresh:
            kept = folder / "agent" / "token"
            talk.print(f"token, shown once and kept in {kept}: {token}", soft_wrap=True, markup=False)
        talk.print("Ctrl-C ends it; whatever else runs on this machine disturbs what it measures", soft_wrap=True)
        print_json({"url": address}) if json else print_text(address)
        sys.stdout.flush()
        server.serve_forever()


def _end(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt
