"""The command that serves searches, recommendations and comparisons by HTTP and in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from paretune.cli.terminal.options import HOME, Home


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines can reach needs a token of yours.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Further name of the service, such as a proxy's public one: a name for any port, or name:port."
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a proxy whose X-Forwarded-For and X-Forwarded-Proto are trusted."),
    ] = None,
    searches: Annotated[
        int, typer.Option(min=0, max=64, help="Searches that run at the same time; 0 serves results only.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads that each search trains on.")] = 1,
    mlflow: Annotated[
        bool, typer.Option("--mlflow", help="Also serve the MLflow UI under /mlflow/, behind the same login.")
    ] = False,
    new_token: Annotated[
        bool, typer.Option("--new-token", help="Make a new token; the old one and all logins become invalid.")
    ] = False,
    home: Home = HOME,
) -> None:
    """Serve searches, recommendations and comparisons by HTTP and as pages. Each search in the queue runs in its own process."""
    from paretune.common.agent_access import allowed_names
    from paretune.service.security.proxies import networks
    from paretune.service.server.serve import Settings, run_service

    hosts, proxies = allowed_names(allow_host or ()), networks(trusted_proxy or ())
    settings = Settings(host, port, hosts, searches, threads, mlflow, new_token, proxies)
    raise typer.Exit(run_service(home.resolve(), settings))
