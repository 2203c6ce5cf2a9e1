"""A target machine as a YAML file that a user can read and edit. Units are in the keys."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from paretune.hardware_profiles.detect import detect_local
from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.kernels import ONNXRUNTIME_CPU, Kernel
from paretune.hardware_profiles.yaml_file import dump_model, load_model

LOCAL = "local-cpu"


class Profile(BaseModel):
    """What a target is and what it executes.

    `weight_formats` lists `<weights>/<activations>` pairs that its engine has a kernel for (kernels.py says what each does); a
    pair that is missing is not proposed, and of the others only those of the precisions that a search asks for.
    `sparse_patterns` lists the patterns that a kernel exploits: any other gains bytes, never time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    description: str
    kind: Literal["cpu", "gpu", "tpu", "fpga", "board"] = "cpu"
    engine: Literal["onnxruntime", "openvino", "torch", "tensorrt", "xla", "vitis"] = "onnxruntime"
    execution_provider: str = "CPUExecutionProvider"
    engine_version: str
    at_hand: bool = True
    threads: int = Field(ge=1, le=1024)
    cores: int = Field(ge=1)
    cpu: str
    isa: tuple[str, ...] = ()
    memory_bytes: int = Field(gt=0)
    power_watts: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    price_usd_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    devices: int = Field(default=1, ge=1)
    weight_formats: tuple[Kernel, ...] = tuple(ONNXRUNTIME_CPU)
    sparse_patterns: tuple[Literal["2:4", "unstructured"], ...] = ()
    source: str

    @field_validator("weight_formats")
    @classmethod
    def _has_the_teachers_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "fp32/fp32" not in value:
            raise ValueError(
                "fp32/fp32 must be among the weight formats, because the fp32 teacher is what all is compared with"
            )
        return value


def local_profile(home: Path) -> Profile:
    """The profile of this machine: `<home>/profiles/local-cpu.yaml`, detected and written at first use."""
    path = home / "profiles" / f"{LOCAL}.yaml"
    if path.exists():
        return load_model(path, Profile)
    profile = detected_profile()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            dump_model(
                profile,
                "Detected by `paretune hardware detect`. Edit it freely: it is read, never overwritten,\n"
                "until you detect again. `threads` is what latency is measured with.",
            )
        )
    except OSError as error:
        raise EnvironmentProblem(
            f"the profile cannot be written to {path}: {error.strerror}", "choose a writable folder with --home"
        ) from None
    return profile


def detected_profile() -> Profile:
    """Detect this machine. Latency is measured on one thread: its spread is 1-3 %, on two it is 10-35 % on shared hosts."""
    machine = detect_local()
    return Profile(
        name=LOCAL,
        description="this machine, ONNX Runtime on the CPU",
        engine_version=machine.engine_version,
        threads=1,
        cores=machine.cores,
        cpu=machine.cpu,
        isa=machine.isa,
        memory_bytes=machine.memory_bytes,
        source=f"detected on {machine.date}",
    )


def load_profile(name_or_path: str, home: Path) -> Profile:
    """A profile by name (in `<home>/profiles`) or by the path of a YAML file. Raises UsageError with the nearest name."""
    if name_or_path == LOCAL:
        return local_profile(home)
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return load_model(path, Profile)
    kept = home / "profiles" / f"{path.name}.yaml"
    if path.name == name_or_path and kept.exists():
        return load_model(kept, Profile)
    known = profile_names(home)
    near = difflib.get_close_matches(name_or_path, known, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise UsageError(f"no profile is called {name_or_path!r}; {hint}", f"or put a YAML file into {home / 'profiles'}")


def profile_names(home: Path) -> list[str]:
    """Names that `load_profile` accepts."""
    return sorted({LOCAL, *(path.stem for path in (home / "profiles").glob("*.yaml"))})
