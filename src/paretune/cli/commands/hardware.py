"""The commands about target machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.terminal.console import print_json, print_text
from paretune.cli.terminal.options import HOME, Home, Json
from paretune.common.command_line import pasted
from paretune.common.errors import UsageError

if TYPE_CHECKING:
    from paretune.hardware_profiles.profile import Profile

hardware = typer.Typer(no_args_is_help=True, help="Target machines.")


@hardware.command("list")
def hardware_list(home: Home = HOME, json: Json = False) -> None:
    """List all targets: those this machine can measure, and those it can only predict."""
    from paretune.hardware_profiles.profile import all_profiles, profile_names

    if json:
        print_json(profile_names(home.resolve()))
        return
    rows = [_row(name, found) for name, found in all_profiles(home.resolve()).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print_text("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


@hardware.command("show")
def hardware_show(
    name: Annotated[str, typer.Argument(help="Name or YAML file.")] = "local-cpu", home: Home = HOME, json: Json = False
) -> None:
    """Print a target's hardware profile as YAML."""
    from paretune.hardware_profiles.profile import load_profile

    _show(load_profile(name, home.resolve()), json)


@hardware.command("detect")
def hardware_detect(home: Home = HOME, json: Json = False) -> None:
    """Detect this machine and write its hardware profile again."""
    from paretune.hardware_profiles.profile import LOCAL, local_profile

    (home.resolve() / "profiles" / f"{LOCAL}.yaml").unlink(missing_ok=True)
    found = local_profile(home.resolve())
    print_json(found.model_dump(mode="json")) if json else print_text(str(home / "profiles" / f"{LOCAL}.yaml"))


@hardware.command("calibrate")
def hardware_calibrate(
    seconds: Annotated[float, typer.Option(min=0.1, max=600.0, help="About how long to measure.")] = 3.0,
    profile: Annotated[str, typer.Option(help="A way to use this machine, such as cpu-2-threads.")] = "local-cpu",
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Measure this machine's bandwidth and peaks and write them into its hardware profile, which predictions need."""
    from paretune.hardware_profiles.calibrate import calibrate, write_peaks
    from paretune.hardware_profiles.profile import load_profile, profile_names

    wanted = load_profile(profile, home.resolve())
    if not wanted.at_hand or wanted.agent is not None or profile not in profile_names(home.resolve()):
        raise UsageError(
            f"only a way to use this machine can be calibrated here, but got {profile!r}",
            f"name local-cpu or another of `{pasted('hardware', 'list', home=home)}` that is measured here",
        )
    peaks = calibrate(wanted.threads, seconds)
    found = write_peaks(peaks, home.resolve(), wanted.name)
    if json:
        print_json(peaks.__dict__)
        return
    print_text(f"{found.bandwidth_gb_per_s:g} GB/s, {peaks.fp32_gflop_per_s:.4g} GFLOP/s in fp32")
    if peaks.int8_gop_per_s is not None:
        print_text(f"{peaks.int8_gop_per_s:.4g} GOP/s in int8")
    print_text(f"{peaks.threads} thread(s); written to {home / 'profiles' / f'{found.name}.yaml'}")


@hardware.command("check")
def hardware_check(
    file: Annotated[Path, typer.Argument(readable=False, help="The YAML file of a hardware profile.")],
    json: Json = False,
) -> None:
    """Check that a YAML file is a valid hardware profile: keys, units, figures and their sources. Exit code 2 if not."""
    from paretune.common.yaml_file import load_model
    from paretune.hardware_profiles.profile import Profile

    found = load_model(file, Profile)
    if json:
        print_json(
            {
                "name": found.name,
                "at_hand": found.at_hand,
                "can_predict": found.can_predict,
                "from_memory": found.from_memory,
            }
        )
        return
    print_text(f"{file}: {found.name} is valid; {_use_of(found)}")
    if found.from_memory:
        print_text(f"from memory, so check before you rely on them: {', '.join(found.from_memory)}")


def _show(profile: Profile, json: bool) -> None:
    from paretune.common.yaml_file import dump_model

    if json:
        print_json(profile.model_dump(mode="json"))
    else:
        print_text(dump_model(profile, f"profile {profile.name}").rstrip())


def _row(name: str, found: Profile | UsageError) -> list[str]:
    if isinstance(found, UsageError):
        return [name, "-", "invalid", found.problem]
    return [name, found.engine, "measured" if found.at_hand else "predicted", found.description]


def _use_of(profile: Profile) -> str:
    if not profile.at_hand:
        return "it is predicted"
    return "it is measured" + (" or predicted" if profile.can_predict else "; to predict it takes bandwidth and peaks")
