"""Whether a candidate deserves quantization-aware training: post-training quantization is tried first, its result decides.

By value (the default): training under the rounding can at best give back what rounding took. So it is spent only on
candidates that would be non-dominated with their *unquantized* quality at their *quantized* latency and size, and whose
rounding costs something at all. With `qat_threshold` the classical rule: only where the loss after post-training quantization is
more than that. Values in, decision out; every decision has its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from paretune.objectives.directions import minimized
from paretune.objectives.quality.quality import relative
from paretune.objectives.units import BYTES
from paretune.search.front import Vector, dominates, non_dominated
from paretune.spaces.candidate import FP32, Candidate

UNITS = {
    "nll": "nats/token",
    "decode_ms_per_token": "ms/token",
    "ttft_ms": "ms to the first token",
    "throughput_tokens_per_s": "tokens/s",
    "energy_j_per_token": "J/token",
    "usd_per_million_tokens": "USD per million tokens",
}


@dataclass(frozen=True)
class PtqResult:
    """What post-training quantization made of a student: mean NLL in nats/token on the search split, with rounding and without.

    `cost_low` is the lower end of the paired interval of their difference; at or below 0 the difference may be chance.
    """

    ptq_nll: float
    unquantized_nll: float
    cost_low: float


@dataclass(frozen=True)
class QatContext:
    """What the director knows: the objectives (all minimized), the candidate's estimated values and the confirmed front's.

    `teacher_search` and `teacher_report` are the fp32 teacher's NLL on the two splits; `qat_threshold` is a fraction of the first.
    """

    objectives: tuple[str, ...]
    estimate: Vector
    front: tuple[Vector, ...]
    teacher_search: float
    teacher_report: float
    qat_threshold: float | None = None

    @classmethod
    def of(cls, objectives: tuple[str, ...], estimate: Vector, confirmed: list[Vector], **rest: Any) -> QatContext:
        """With the non-dominated ones of all `confirmed` vectors as the front."""
        return cls(objectives, estimate, tuple(confirmed[i] for i in non_dominated(confirmed)), **rest)


@dataclass(frozen=True)
class QatDecision:
    """`qat`: whether to train under the rounding. `reason` is never empty."""

    qat: bool
    reason: str


def escalate(tried: PtqResult, context: QatContext) -> QatDecision:
    """The decision for one candidate."""
    if context.qat_threshold is not None:
        return _classical(tried, context.teacher_search, context.qat_threshold)
    cost = tried.ptq_nll - tried.unquantized_nll
    if tried.cost_low <= 0:
        return QatDecision(
            False, f"rounding costs {cost:+.4f} nats/token, which may be chance: there is nothing to win back"
        )
    best = _optimistic(tried, context)
    better = next((v for v in context.front if dominates(v, best)), None)
    if better is not None:
        return QatDecision(
            False,
            f"even with its unquantized quality ({_told(context.objectives, best)}) it would be dominated by a confirmed "
            f"candidate ({_told(context.objectives, better)})",
        )
    return QatDecision(
        True,
        f"with its unquantized quality at its quantized cost ({_told(context.objectives, best)}) it would be non-dominated, "
        f"and rounding costs {cost:+.4f} nats/token",
    )


def may_escalate(candidate: Candidate) -> bool:
    """Whether training may see the rounding at all: layers of fewer than 8 bits, unless calibration finds the codes."""
    forms = [f for layer in candidate.layers for f in (layer.attention_format, layer.ffn_format)]
    return not candidate.needs_calibration and any(f.bits < 8 for f in forms)


def not_eligible(candidate: Candidate) -> QatDecision:
    """Why a candidate that cannot be trained under its rounding is not."""
    if not candidate.is_quantized:
        return QatDecision(False, "nothing is quantized")
    if candidate.needs_calibration:
        return QatDecision(
            False,
            "its codes come from calibration text (GPTQ, clipping, static activations), which rounds after training",
        )
    return QatDecision(False, "its layers have 8 bits or more: what rounding costs there is less than training moves")


def unrounded(candidate: Candidate) -> Candidate:
    """The same student with every matrix in fp32."""
    layers = tuple(replace(x, attention_format=FP32, ffn_format=FP32) for x in candidate.layers)
    return replace(candidate, layers=layers, head_format=FP32, embedding_format=FP32)


def _classical(tried: PtqResult, teacher: float, qat_threshold: float) -> QatDecision:
    loss = relative(tried.ptq_nll - teacher, teacher)
    told = f"post-training quantization loses {loss:.2%} of the teacher's NLL"
    if loss > qat_threshold:
        return QatDecision(True, f"{told}, more than the {qat_threshold:.2%} that --qat-threshold allows")
    return QatDecision(False, f"{told}, within the {qat_threshold:.2%} that --qat-threshold allows")


def _optimistic(tried: PtqResult, context: QatContext) -> Vector:
    """The estimated vector with the best NLL that training under the rounding can hope for, on the report split."""
    measured = context.teacher_report + tried.unquantized_nll - context.teacher_search
    return tuple(
        min(value, measured) if name == "nll" else value
        for name, value in zip(context.objectives, context.estimate, strict=True)
    )


def _told(objectives: tuple[str, ...], vector: Vector) -> str:
    return ", ".join(
        f"{value / 1e6:.2f} MB" if name in BYTES else f"{minimized(name, value):.3f} {UNITS[name]}"
        for name, value in zip(objectives, vector, strict=True)
    )
