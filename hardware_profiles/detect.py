"""What this machine is: processor, instruction sets, memory, engine version; and its fingerprint."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)


@dataclass(frozen=True)
class Machine:
    """Facts of the running machine. `cores` counts what this process may use."""

    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory_bytes: int
    engine_version: str
    date: str


# Distributions that install the same module under another name.
BUILDS = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime-migraphx", "onnxruntime-rocm")}


def package_version(name: str) -> str:
    """Version of an installed distribution by its metadata (nothing is imported), or `not installed`."""
    for found in (name, *BUILDS.get(name, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(found)
    return "not installed"


def detect_local() -> Machine:
    """Read the facts of this machine. Where /proc/cpuinfo is missing, `isa` is empty and the CPU's name is Python's."""
    text = _read("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((named.get("flags") or named.get("Features") or "").split())
    family = f" family {named['cpu family']} model {named['model']}" if "cpu family" in named else ""
    return Machine(
        cpu=(named.get("model name") or platform.processor() or platform.machine()) + family,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        memory_bytes=memory_bytes(),
        engine_version=package_version("onnxruntime"),
        date=datetime.date.today().isoformat(),
    )


def memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def last_level_cache_bytes() -> int | None:
    """The largest cache that the first processor reports; None where the system does not say."""
    sizes = [_read(str(path)).strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=None)


def fingerprint() -> str:
    """12 hex digits over what a latency depends on: processor, cores, instruction sets, kernel release, engine version."""
    machine = detect_local()
    parts = (machine.cpu, machine.cores, machine.isa, platform.release(), machine.engine_version)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
