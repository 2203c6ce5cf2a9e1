"""The measuring lane's fixed reference: the embedded teacher's fp32 graph, built once per home, and its nominal times."""

from __future__ import annotations

import json
from pathlib import Path

from paretune.compression.export.graph import build_model, save_model
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.files import write_atomically
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.lane import Lane, Nominal
from paretune.spaces.candidate import Candidate, Layer
from paretune.teachers import EMBEDDED, load_teacher


def open_lane(cache: Path, profile: Profile, lock: MachineLock) -> Lane:
    """The lane with its fixed reference: the embedded teacher's fp32 graph in the profile's engine."""
    embedded = load_teacher(EMBEDDED)
    machine, folder = fingerprint(), cache / "lane"
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / f"reference-{embedded.digest}.onnx"
    if not reference.exists():
        shape = embedded.shape
        plain = Candidate((Layer(shape.ffn, shape.kv_heads),) * shape.layers)
        temporary = reference.with_suffix(".tmp")
        save_model(build_model(embedded.weights(), plain, embedded.config, shape), temporary)
        temporary.replace(reference)
    kept = folder / f"nominal-{machine}-t{profile.threads}.json"

    def nominal(value: Nominal | None) -> Nominal | None:
        if value is not None:
            write_atomically(kept, json.dumps(value.__dict__).encode())
        return Nominal(**json.loads(kept.read_text())) if kept.exists() else None

    return Lane(reference, profile.threads, machine, lock, nominal)
