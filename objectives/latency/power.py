"""Counters of energy that a machine offers: RAPL of the CPU packages (Linux powercap), NVML of an NVIDIA GPU.

All of them answer joules since some moment, of which only differences mean something. They count the whole package or board,
with whatever else runs there; the latency benchmark reads them only while it holds the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(
    r"^intel-rapl:\d+$"
)  # AMD's too; subzones (intel-rapl:0:0) lie inside, intel-rapl-mmio doubles them
SAMPLE_MS = 50


class EnergyCounter(Protocol):
    """`source` names what is counted; `settle_s` is how long an interval must be for its resolution not to matter."""

    source: str
    settle_s: float

    def joules(self) -> float:
        """Return the joules counted since some moment; they never decrease."""

    def close(self) -> None:
        """Let go of what was opened."""


class Rapl:
    """Sum of all CPU packages. A counter that wraps is continued; it must be read once per wrap (some minutes at full power)."""

    settle_s = 0.3

    def __init__(self, zones: list[Path]) -> None:
        self.source = f"RAPL, {len(zones)} package(s) with all that runs on them"
        self._zones = zones
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in zones]
        self._last = [_microjoules(zone / "energy_uj") for zone in zones]
        self._total = 0

    def joules(self) -> float:
        """Return the joules of all packages since the counter was opened."""
        for i, zone in enumerate(self._zones):
            now = _microjoules(zone / "energy_uj")
            step = now - self._last[i]
            self._total += step if step >= 0 else step + self._ranges[i]
            self._last[i] = now
        return self._total / 1e6

    def close(self) -> None:
        """Nothing stays open."""


class Nvml:
    """The board's own counter, through pynvml (GPUs since Volta)."""

    settle_s = 0.3

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.source = "NVML, the whole board"
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Return the joules of the board since its driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def close(self) -> None:
        """Shut NVML down. Errors are ignored."""
        with contextlib.suppress(Exception):  # it may have gone with its driver
            self._nvml.nvmlShutdown()


class NvidiaSmi:
    """Power that nvidia-smi prints every 50 ms, integrated; for machines without pynvml."""

    settle_s = 2.0

    def __init__(self, program: str) -> None:
        self.source = f"nvidia-smi, the whole board, power every {SAMPLE_MS} ms"
        arguments = ["--id=0", "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
        self._process = subprocess.Popen(
            [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        self._lock = threading.Lock()
        self._first = threading.Event()
        self._watts: float | None = None
        self._since, self._total = 0.0, 0.0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Up to now, with the last power that was printed."""
        with self._lock:
            self._advance()
            return self._total

    def answers(self, timeout_s: float = 10.0) -> bool:
        """Whether a power was printed: boards without a sensor say [N/A]."""
        return self._first.wait(timeout_s) and self._watts is not None

    def close(self) -> None:
        """End nvidia-smi and the thread that reads from it."""
        self._process.kill()
        self._process.wait()
        self._thread.join(2)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                self._advance()
                with contextlib.suppress(ValueError):
                    self._watts = float(line)
            self._first.set()
        self._first.set()

    def _advance(self) -> None:
        now = time.monotonic()
        self._total += (self._watts or 0.0) * (now - self._since)
        self._since = now


def energy_counter(kind: str, powercap: Path = POWERCAP) -> EnergyCounter | None:
    """The counter for a profile of this kind ("gpu": NVML, else RAPL), or None where there is none or it may not be read."""
    return _gpu_counter() if kind == "gpu" else rapl(powercap)


def rapl(powercap: Path = POWERCAP) -> Rapl | None:
    """The package counters below `powercap`; None without them, or (usual for ordinary users) without the right to read them."""
    zones = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if PACKAGE.match(zone.name) and (zone / "name").read_text(encoding="utf-8").startswith("package"):
                _microjoules(zone / "energy_uj")
                zones.append(zone)
    return Rapl(zones) if zones else None


def _gpu_counter() -> EnergyCounter | None:
    with contextlib.suppress(Exception):  # no pynvml, no driver, no such counter on this board
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        found = Nvml(pynvml, pynvml.nvmlDeviceGetHandleByIndex(0))
        found.joules()
        return found
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    sampled = NvidiaSmi(program)
    if sampled.answers():
        return sampled
    sampled.close()
    return None


def _microjoules(path: Path) -> int:
    return int(path.read_text(encoding="utf-8"))
