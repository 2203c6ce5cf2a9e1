"""What a kept measurement depends on besides the model: the target, the engine and its version, the machine, the way of timing."""

from __future__ import annotations

import hashlib
import re

from paretune.hardware_profiles.detect import package_version
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.latency.workload import STANDARD, Workload
from paretune.spaces.candidate import DENSE, Pattern

# The distribution that holds an engine, whose installed version counts: that in a profile's file may be of last year.
DISTRIBUTIONS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "torch": "torch",
    "tensorrt": "tensorrt",
    "xla": "torch-xla",
}
CPU_PROVIDER = "CPUExecutionProvider"


def engine_version(profile: Profile) -> str:
    """The installed version of the profile's engine; what the profile says where no distribution is known."""
    name = DISTRIBUTIONS.get(profile.engine)
    return profile.engine_version if name is None else package_version(name)


def target_key(profile: Profile, fingerprint: str, turn: Workload = STANDARD) -> str:
    """A folder name over profile, machine (`fingerprint`), engine, version, provider, threads, batch, prompt and steps."""
    parts = (
        profile.name,
        fingerprint,
        profile.engine,
        engine_version(profile),
        profile.execution_provider.removesuffix("ExecutionProvider"),
        f"t{profile.threads}",
        f"b{turn.batch}",
        f"p{turn.prompt}+{turn.tokens}",
    )
    return "-".join(re.sub(r"[^\w.+]", "_", part) for part in parts)


def engine_fingerprint(profile: Profile, machine: str) -> str:
    """12 hex digits: that of the machine, which holds ONNX Runtime's version; for another engine or provider with that of the
    engine."""
    if profile.engine == "onnxruntime" and profile.execution_provider == CPU_PROVIDER:
        return machine
    parts = (machine, profile.engine, engine_version(profile), profile.execution_provider)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def timed_pattern(pattern: Pattern, profile: Profile) -> Pattern:
    """The pattern as far as it decides the time: its kind and ratio where a kernel of the target exploits it, else none."""
    if pattern.kind in profile.sparse_patterns:
        return Pattern(pattern.kind, pattern.ratio)
    return DENSE
