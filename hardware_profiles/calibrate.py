"""What this machine really reaches: memory bandwidth and arithmetic peaks, measured in a child process.

Bandwidth is read by a matrix-vector product and a dot product over 256 MiB (what decoding does), fp32 and int8 by ONNX
Runtime's matrix products (numpy's fp32 one is half as fast on some processors). What a model of a quarter of the last cache could get
from it is read likewise. Each is the best of many short runs, because a disturbance only ever makes one slower. They
are peaks of good code, not of every kernel: the profile's efficiencies still apply.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.files import write_atomically
from paretune.common.yaml_file import dump_model, load_model, set_keys
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import LOCAL, load_profile, local_profile
from paretune.hardware_profiles.schema import Profile

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
MORE_SECONDS = 60.0
# The engine's own products were measured, so it reaches nearly all of them.
PRIORS_OF_MEASURED = {"compute_efficiency": [0.5, 0.85, 1.0], "bandwidth_efficiency": [0.5, 0.85, 1.0]}


@dataclass(frozen=True)
class Peaks:
    """Bandwidth in 1e9 bytes/s, arithmetic in 1e9 operations/s (a multiply-add counts two), on `threads` threads.

    `int8_gop_per_s` is None where the onnx package, which writes the integer product, is not installed;
    fp32 is numpy's then.
    """

    threads: int
    bandwidth_gb_per_s: float
    fp32_gflop_per_s: float
    int8_gop_per_s: float | None
    cache_bytes: int | None = None
    cache_gb_per_s: float | None = None


def calibrate(threads: int, seconds: float = 3.0) -> Peaks:
    """Measure for about `seconds` under the machine lock. Raises EnvironmentProblem if the child fails or is too slow."""
    if threads < 1 or not 0 < seconds <= 600:
        raise UsageError(
            f"threads >= 1 and 0 < seconds <= 600 must hold, but got {threads} and {seconds:g}", "change the options"
        )
    command = [sys.executable, "-m", "paretune.hardware_profiles.calibration_child", str(threads), str(seconds)]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"OMP_WAIT_POLICY": "PASSIVE"}
    with MachineLock().exclusive():
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment,
                timeout=seconds + MORE_SECONDS,
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired:
            raise EnvironmentProblem(
                f"calibration took more than {seconds + MORE_SECONDS:.0f} s", "end what else keeps this machine busy"
            ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(f"calibration failed: {reason}", "free memory, or check numpy and onnxruntime")
    return Peaks(threads, **json.loads(done.stdout))


def write_peaks(peaks: Peaks, home: Path, name: str = LOCAL) -> Profile:
    """Put the peaks with their source into `<home>/profiles/<name>.yaml`, comments and other keys as they are; a shipped way to use
    this machine gets a file of its own then.

    Raises UsageError if the file would not be a valid profile then; it is left alone in that case.
    """
    path = home / "profiles" / f"{name}.yaml"
    if name == LOCAL:
        local_profile(home)
    elif not path.exists():
        told = f"{name} with what was measured; remove this file to follow {LOCAL} again."
        write_atomically(path, dump_model(load_profile(name, home), told).encode())
    source = f"measured by `paretune hardware calibrate` on {date.today().isoformat()}, {peaks.threads} thread(s)"
    figures: dict[str, float] = {
        "bandwidth_gb_per_s": _short(peaks.bandwidth_gb_per_s),
        "peak_fp32_tflops": _short(peaks.fp32_gflop_per_s / 1e3),
    }
    if peaks.int8_gop_per_s is not None:
        figures["peak_int8_tops"] = _short(peaks.int8_gop_per_s / 1e3)
    if peaks.cache_bytes is not None and peaks.cache_gb_per_s is not None:
        figures |= {"cache_bytes": peaks.cache_bytes, "cache_gb_per_s": _short(peaks.cache_gb_per_s)}
    sources = dict.fromkeys(figures, source)
    changes: dict[str, object] = {**figures, **PRIORS_OF_MEASURED}
    changes["sources"] = sources | dict.fromkeys(PRIORS_OF_MEASURED, "prior for peaks that were measured, not read")
    set_keys(path, changes, Profile)
    return load_model(path, Profile)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
