"""What the pictures of a profile draw: points under the roofline, milliseconds per layer, what the places would save."""

from __future__ import annotations

from dataclasses import dataclass

from paretune.objectives.profiler.op_costs import PHASES
from paretune.objectives.profiler.op_profile import OpProfile
from paretune.spaces.candidate import Format

COLOURS = {
    "attention": "#2f7fe0",
    "ffn": "#ee7b1c",
    "head": "#b83fb5",
    "embedding": "#12a37a",
    "other": "#808890",
    "between ops": "#c3ccd4",
}
PHASE_COLOURS = {"prefill": "#b83fb5", "decode": "#2f7fe0"}
LEAST_SHARE = 0.01
ROOF_POINTS = 60
INT8 = Format(8, 32, "int8")


@dataclass(frozen=True)
class RoofPoint:
    """One kind of op of a phase: operations per byte, 10^9 operations per second, share of the phase's time."""

    label: str
    phase: str
    intensity: float
    gflop_per_s: float
    share: float


def roof_points(found: OpProfile) -> list[RoofPoint]:
    """Ops that calculate and take at least a hundredth of their phase."""
    return [
        RoofPoint(t.label, phase, t.intensity, t.gflop_per_s, t.share)
        for phase in PHASES
        for t in found.totals(phase, "ops")
        if t.share >= LEAST_SHARE and t.intensity > 0 and t.gflop_per_s > 0
    ]


def roof_lines(found: OpProfile) -> dict[str, tuple[list[float], list[float]]]:
    """Intensities and the most that can be reached there, with fp32 and with int8 arithmetic; both axes are logarithmic."""
    seen = [p.intensity for p in roof_points(found)]
    ridge = found.roof.int8_gop_per_s / found.roof.bandwidth_gb_per_s
    low, high = min([0.05, *seen]) / 2, max([ridge, *seen]) * 4
    xs = [low * (high / low) ** (i / (ROOF_POINTS - 1)) for i in range(ROOF_POINTS)]
    peaks = {"fp32 roof": found.roof.fp32_gflop_per_s, "int8 roof": found.roof.int8_gop_per_s}
    return {name: (xs, [min(peak, x * found.roof.bandwidth_gb_per_s) for x in xs]) for name, peak in peaks.items()}


def layer_bars(found: OpProfile) -> tuple[list[str], dict[str, list[float]]]:
    """Names of the bars in the order of execution, and the milliseconds of a decode step that each group takes in each."""
    costs = [c for c in found.costs if c.phase == "decode"]
    names = ["embedding", *(f"layer {i}" for i in sorted({c.layer for c in costs if c.layer is not None}))]
    names += ["head", "rest"]
    bars = {group: [0.0] * len(names) for group in COLOURS}
    for cost in costs:
        inside = cost.group if cost.group in ("embedding", "head") else "rest"
        name = inside if cost.layer is None else f"layer {cost.layer}"
        bars[cost.group][names.index(name)] += cost.ms
    bars["between ops"][-1] = found.between_ms("decode")
    return names, bars


def title(found: OpProfile) -> str:
    """Return the title of a profile's pictures: what was profiled where, decode and TTFT, engine and threads."""
    m, s = found.measurements, found.settings
    doubt = " (disturbed)" if m["decode_ms_per_token"].provenance == "disturbed" else ""
    return (
        f"{found.subject.name} on {s['profile']}: {m['decode_ms_per_token'].value:.3f} ms/token, "
        f"TTFT {m['ttft_ms'].value:.2f} ms ({s['prompt']} tokens){doubt}, {s['engine']}, {s['threads']} thread(s)"
    )
