"""The shipped profiles: `library/*.yaml` of targets elsewhere, `library/here/*.yaml` of other ways to use this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from paretune.common.errors import UsageError
from paretune.common.yaml_file import load_model
from paretune.hardware_profiles.detect import package_version
from paretune.hardware_profiles.kernels import Kernel
from paretune.hardware_profiles.schema import DEVICE_SPECS, Engine, Profile

FOLDER = Path(__file__).resolve().parent / "library"
HERE = FOLDER / "here"
# Figures that another engine or number of threads does not change.
KEPT = ("power_watts", "price_usd_per_hour")


class Variant(BaseModel):
    """Another way to use this machine: local-cpu with these changes. `least_cores`: how many it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    engine: Engine = "onnxruntime"
    threads: int | None = Field(default=None, ge=1)
    least_cores: int = Field(default=1, ge=1)
    weight_formats: tuple[Kernel, ...] | None = None
    source: str


def library_names(cores: int) -> list[str]:
    """Names of the shipped profiles that a machine of `cores` can use, measured or predicted."""
    return sorted(
        [*(path.stem for path in FOLDER.glob("*.yaml")), *(v.name for v in variants() if v.least_cores <= cores)]
    )


def variants() -> list[Variant]:
    """All shipped ways to use this machine."""
    return [load_model(path, Variant) for path in sorted(HERE.glob("*.yaml"))]


def library_profile(name: str, local: Callable[[], Profile]) -> Profile | None:
    """The shipped profile of that name, None if there is none; `local` gives the profile that variants of this machine change.

    Raises UsageError where this machine has too few cores for it.
    """
    if Path(name).name != name:
        return None
    if (FOLDER / f"{name}.yaml").exists():
        return load_model(FOLDER / f"{name}.yaml", Profile)
    if (HERE / f"{name}.yaml").exists():
        return _changed(local(), load_model(HERE / f"{name}.yaml", Variant))
    return None


def _changed(local: Profile, variant: Variant) -> Profile:
    """`local` as the variant uses it. Calibrated figures hold for their own number of threads only."""
    if local.cores < variant.least_cores:
        raise UsageError(
            f"{variant.name} needs {variant.least_cores} cores, but this machine has {local.cores}",
            "choose another profile",
        )
    threads = variant.threads or local.threads
    lost = () if threads == local.threads else tuple(name for name in DEVICE_SPECS if name not in KEPT)
    return Profile.model_validate(
        local.model_dump()
        | dict.fromkeys(lost)
        | {
            "name": variant.name,
            "description": variant.description,
            "engine": variant.engine,
            "engine_version": package_version(variant.engine),
            "threads": threads,
            "weight_formats": variant.weight_formats or local.weight_formats,
            "sources": {key: text for key, text in local.sources.items() if key not in lost},
            "source": f"{variant.source}; else as {local.name}: {local.source}",
        }
    )
