"""What a candidate would take on a target that is not at hand: a sum of rooflines, with the interval of the profile's priors.

The interval is not statistical: it spans the profile's low to high efficiencies and overheads, taken together, so it is wide.
Ranks between candidates on one target depend on the priors much less than the milliseconds do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from paretune.common.command_line import pasted
from paretune.common.errors import UsageError
from paretune.hardware_profiles.schema import CPU_PROVIDER, Profile
from paretune.objectives.energy import energy_and_cost
from paretune.objectives.measurement import Measurement, Provenance
from paretune.objectives.prediction.parallel import all_reduce_ms, degree_fact, split_problem, tensor_parallel_degree
from paretune.objectives.prediction.roofline import Milliseconds, Step, activation_bytes, resident_bytes, time_of, works
from paretune.objectives.prediction.silicon import tables_of
from paretune.spaces.candidate import Candidate, Shape

# What an engine's memory is of what must be there (low, likely, high): allocators reserve, and a CPU engine may hold weights
# twice while it packs them.
MEMORY_CPU, MEMORY_OTHER = (1.0, 1.2, 2.2), (1.0, 1.1, 1.5)
# An all-reduce against its alpha-beta model.
COMMUNICATION = (0.5, 1.0, 2.5)


def predict(
    profile: Profile, candidate: Candidate, shape: Shape, prompt: int = 128, context: int = 128, batch: int = 1
) -> dict[str, Measurement]:
    """Predicted figures by name: `decode_ms_per_token` (one step of all `batch` sequences after `context` tokens each),
    `ttft_ms` (prefill of `prompt` tokens each), `throughput_tokens_per_s`, `peak_memory_bytes` (per device), and with the
    profile's power and price `energy_j_per_token` and `usd_per_million_tokens`. A profile of several devices also has
    `tensor_parallel_degree`, the fewest of them that suffice; power and price are of those.

    Raises Infeasible where the model does not fit the profile's devices, UsageError where the profile lacks figures.
    """
    for name, value in (("prompt", prompt), ("context", context), ("batch", batch)):
        if value < (0 if name == "context" else 1):
            raise ValueError(f"{name} must be at least {0 if name == 'context' else 1}, but got {value}")
    require_figures(profile)
    steps = Step(prompt, 0, batch), Step(1, context, batch)
    degree = _degree(profile, candidate, shape, steps)
    note = _note(profile, degree, batch)
    ttft, decode = (
        _measurement(forward(profile, candidate, shape, step, degree), unit, note, profile)
        for step, unit in zip(steps, ("ms", "ms/token"), strict=True)
    )
    per_token = replace(decode, value=decode.value / batch, low=decode.low / batch, high=decode.high / batch)
    split = {"tensor_parallel_degree": degree_fact(degree, profile)} if profile.devices > 1 else {}
    return {
        "decode_ms_per_token": decode,
        "ttft_ms": ttft,
        "throughput_tokens_per_s": Measurement(
            1e3 / per_token.value,
            "tokens/s",
            1e3 / per_token.high,
            1e3 / per_token.low,
            decode.provenance,
            0,
            "",
            decode.note,
        ),
        "peak_memory_bytes": _memory(profile, candidate, shape, steps, degree, note),
        **energy_and_cost(per_token, profile, degree),
        **split,
    }


def require_figures(profile: Profile) -> None:
    """Raises UsageError where a prediction on `profile` is impossible."""
    if missing := profile.missing_figures:
        option = () if profile.name == "local-cpu" else ("--profile", profile.name)
        calibrate = f"run `{pasted('hardware', 'calibrate', *option)}`"
        remedy = calibrate if profile.at_hand else "add them, each with its source"
        raise UsageError(f"the profile {profile.name} lacks {' and '.join(missing)}, which a prediction needs", remedy)


def forward(profile: Profile, candidate: Candidate, shape: Shape, step: Step, degree: int = 1) -> Milliseconds:
    """Milliseconds of one call on `degree` devices: its ops after each other, and two all-reduces per layer."""
    parts = [work.divided(degree) for work in works(candidate, shape, profile, step)]
    read = sum(part.weight_bytes + part.cache_bytes for part in parts)
    tables = tables_of(profile)
    known = [None if tables is None else tables.time_of(part, step.rows) for part in parts]
    times = [found or time_of(part, profile, read) for part, found in zip(parts, known, strict=True)]
    message = step.rows * candidate.width(shape) * activation_bytes(candidate, profile)
    reduces = 2 * len(candidate.layers) * all_reduce_ms(message, degree, profile)
    low, likely, high = (share * reduces for share in COMMUNICATION)
    waiting = sum(t.likely for t in times if t.waits == "memory")
    total = sum(t.likely for t in times)
    return Milliseconds(
        sum(t.low for t in times) + low,
        total + likely,
        sum(t.high for t in times) + high,
        "memory" if waiting >= total / 2 else "arithmetic",
        sum(found.likely for found in known if found is not None) / (total + likely),
    )


@dataclass(frozen=True)
class _Needed:
    """Bytes that one of `degree` devices must hold: its part of weights and cache, and the activations; infinite where a
    quantization group or a sparsity block would have to be divided."""

    parts: tuple[tuple[float, float, float], ...]
    candidate: Candidate
    shape: Shape

    def __call__(self, degree: int) -> float:
        if split_problem(self.candidate, self.shape, degree) is not None:
            return math.inf
        return max((weights + cache) / degree + activations for weights, cache, activations in self.parts)


def _degree(profile: Profile, candidate: Candidate, shape: Shape, steps: tuple[Step, ...]) -> int:
    return tensor_parallel_degree(_needed(profile, candidate, shape, steps), profile, _student_heads(candidate, shape))


def _needed(profile: Profile, candidate: Candidate, shape: Shape, steps: tuple[Step, ...]) -> _Needed:
    return _Needed(tuple(resident_bytes(candidate, shape, profile, step) for step in steps), candidate, shape)


def _student_heads(candidate: Candidate, shape: Shape) -> Shape:
    """The shape with as many KV heads as every layer of the candidate can be divided by."""
    groups = math.gcd(*(layer.kv_groups for layer in candidate.layers))
    return replace(shape, kv_heads=groups, heads=groups * shape.heads_per_group)


def _memory(
    profile: Profile, candidate: Candidate, shape: Shape, steps: tuple[Step, ...], degree: int, note: str
) -> Measurement:
    needed = _needed(profile, candidate, shape, steps)(degree)
    on_cpu = profile.engine == "onnxruntime" and profile.execution_provider == CPU_PROVIDER
    low, likely, high = MEMORY_CPU if on_cpu else MEMORY_OTHER
    return Measurement(likely * needed, "bytes", low * needed, high * needed, "predicted", 0, "", note)


def _measurement(time: Milliseconds, unit: str, note: str, profile: Profile) -> Measurement:
    """ "table" where at least half of the time comes from measured tables."""
    tables = tables_of(profile) if time.table_share else None
    if tables is not None:
        note = f"{time.table_share:.0%} of it from measured tables ({tables.source}); the rest: {note}"
    provenance: Provenance = "table" if time.table_share >= 0.5 else "predicted"
    return Measurement(time.likely, unit, time.low, time.high, provenance, 0, "", f"{note}; {time.waits} bounds it")


def _note(profile: Profile, degree: int, batch: int) -> str:
    low, _, high = profile.bandwidth_efficiency
    split = f", on {degree} devices" if degree > 1 else ""
    many = f", batch {batch}" if batch > 1 else ""
    return (
        f"roofline of {profile.name}{split}{many}: {low:.0%} to {high:.0%} of its bandwidth, priors not measured here"
    )
