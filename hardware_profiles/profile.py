"""Finding a profile by name: this machine's, those in `<home>/profiles`, and the shipped ones."""

from __future__ import annotations

import difflib
from pathlib import Path

from paretune.common.errors import UsageError
from paretune.common.file_access import is_file, unwritable
from paretune.common.yaml_file import dump_model, load_model
from paretune.hardware_profiles.detect import detect_local
from paretune.hardware_profiles.library import library_names, library_profile
from paretune.hardware_profiles.schema import Profile

__all__ = ["LOCAL", "Profile", "detected_profile", "load_profile", "local_profile", "profile_names"]

LOCAL = "local-cpu"


def local_profile(home: Path) -> Profile:
    """The profile of this machine: `<home>/profiles/local-cpu.yaml`, detected and written at first use."""
    path = home / "profiles" / f"{LOCAL}.yaml"
    if is_file(path):
        return load_model(path, Profile)
    profile = detected_profile()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            dump_model(
                profile,
                "Detected by `paretune hardware detect`. Edit it freely: it is read, never overwritten,\n"
                "until you detect again. `threads` is what latency is measured with.",
            ),
            encoding="utf-8",
        )
    except OSError as error:
        raise unwritable(path, error, "choose a writable folder with --home", "the profile") from None
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
    """A profile by the path of a YAML file, or by name: in `<home>/profiles`, else a shipped one. Raises UsageError with the
    nearest name."""
    if name_or_path == LOCAL:
        return local_profile(home)
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        return load_model(path, Profile)
    kept = home / "profiles" / f"{path.name}.yaml"
    if path.name == name_or_path and kept.exists():
        return load_model(kept, Profile)
    shipped = library_profile(name_or_path, lambda: local_profile(home))
    if shipped is not None:
        return shipped
    known = profile_names(home)
    near = difflib.get_close_matches(name_or_path, known, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise UsageError(f"no profile is called {name_or_path!r}; {hint}", f"or put a YAML file into {home / 'profiles'}")


def profile_names(home: Path) -> list[str]:
    """Names that `load_profile` accepts on this machine."""
    kept = (path.stem for path in (home / "profiles").glob("*.yaml"))
    return sorted({LOCAL, *kept, *library_names(detect_local().cores)})


def all_profiles(home: Path) -> dict[str, Profile | UsageError]:
    """Every profile by name, or what is wrong with its file. Writes nothing."""
    kept = home / "profiles" / f"{LOCAL}.yaml"

    def local() -> Profile:
        return load_model(kept, Profile) if kept.exists() else detected_profile()

    found: dict[str, Profile | UsageError] = {}
    for name in profile_names(home):
        path = home / "profiles" / f"{name}.yaml"
        try:
            shipped = None if path.exists() or name == LOCAL else library_profile(name, local)
            found[name] = shipped or (local() if name == LOCAL else load_model(path, Profile))
        except UsageError as error:
            found[name] = error
    return found
