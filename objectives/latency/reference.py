"""The latency benchmark's fixed reference: the embedded teacher at int4, built once per home, and its nominal times.

Not at fp32: 23 MB do not stay in a third-level cache that other machines share, and a reference that wanders by 10 % makes
every ratio wander. The int4 graph fits (docs/log.md has the figures).
"""

from __future__ import annotations

from pathlib import Path

from paretune.compression.export.graph import build_model, save_model
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.latency.benchmark import LatencyBenchmark
from paretune.objectives.latency.measurement_key import engine_fingerprint
from paretune.objectives.latency.nominal import kept_in
from paretune.objectives.latency.power import energy_counter
from paretune.objectives.latency.workload import STANDARD, Workload
from paretune.spaces.candidate import Candidate, Format, Layer
from paretune.teachers.checkpoint.teacher import EMBEDDED, load_teacher


def open_local_benchmark(
    cache: Path, profile: Profile, lock: MachineLock, turn: Workload = STANDARD
) -> LatencyBenchmark:
    """The latency benchmark of a profile: the candidate in its engine, beside the fixed reference in ONNX Runtime with as many threads.

    `turn` is what candidates are timed with.
    """
    embedded = load_teacher(EMBEDDED)
    machine, folder = fingerprint(), cache / "lane"
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / f"reference-int4-{embedded.digest}.onnx"
    if not reference.exists():
        shape = embedded.shape
        int4 = Format(4, 32, "int8")
        plain = Candidate((Layer(shape.ffn, shape.kv_heads, int4, int4),) * shape.layers, int4, int4).canonical(shape)
        temporary = reference.with_suffix(".tmp")
        save_model(build_model(embedded.weights(), plain, embedded.config, shape), temporary)
        temporary.replace(reference)
    kept = folder / f"nominal-int4-{machine}-t{profile.threads}.json"

    return LatencyBenchmark(
        reference,
        profile.threads,
        engine_fingerprint(profile, machine),
        lock,
        kept_in(kept),
        profile.engine,
        profile.execution_provider,
        lambda: energy_counter(profile.kind),
        turn,
    )
