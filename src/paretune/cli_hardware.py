"""The commands about target machines."""

from __future__ import annotations

from typing import Annotated

import typer

from paretune.cli_options import HOME, Home, Json
from paretune.console import print_json, print_text

hardware = typer.Typer(no_args_is_help=True, help="Target machines.")


@hardware.command("list")
def hardware_list(home: Home = HOME, json: Json = False) -> None:
    """Names of the profiles at hand."""
    from paretune.hardware_profiles.profile import profile_names

    names = profile_names(home.resolve())
    print_json(names) if json else print_text("\n".join(names))


@hardware.command("show")
def hardware_show(
    name: Annotated[str, typer.Argument(help="Name or YAML file.")] = "local-cpu", home: Home = HOME, json: Json = False
) -> None:
    """A profile as YAML."""
    from paretune.hardware_profiles.profile import load_profile
    from paretune.hardware_profiles.yaml_file import dump_model

    found = load_profile(name, home.resolve())
    print_json(found.model_dump(mode="json")) if json else print_text(
        dump_model(found, f"profile {found.name}").rstrip()
    )


@hardware.command("detect")
def hardware_detect(home: Home = HOME, json: Json = False) -> None:
    """Detect this machine and write its profile anew."""
    from paretune.hardware_profiles.profile import LOCAL, local_profile

    (home.resolve() / "profiles" / f"{LOCAL}.yaml").unlink(missing_ok=True)
    found = local_profile(home.resolve())
    print_json(found.model_dump(mode="json")) if json else print_text(str(home / "profiles" / f"{LOCAL}.yaml"))
