"""A simulated evaluator: answers every kind of work from a formula, so that a whole search runs in a second.

It is the fake of the expensive seam (Syne Tune's simulator is the model): tests and dry experiments with the policy use it,
inline with a clock of its own or inside real Ray workers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from paretune.common.checksums import CHECKSUMS, sha256, write_checksums
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.energy import following
from paretune.objectives.measurement import Measurement
from paretune.objectives.prediction.latency_fit import KERNEL_BITS, features
from paretune.objectives.quality.quality import Scores, quality_measurements
from paretune.search.escalation import PtqResult, escalate, may_escalate, not_eligible, unrounded
from paretune.search.evaluators.evaluator import Evaluator
from paretune.search.spec import Spec
from paretune.search.tasks.base import Outcome, Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic, ElasticResult
from paretune.search.tasks.evaluation import EvaluationResult, EvaluationTask
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.fit import Fit, FitResult
from paretune.search.tasks.recover import Recover, Recovered, RecoverResult
from paretune.search.tasks.sensitivity import MeasureSensitivity, SensitivityResult
from paretune.spaces.candidate import Candidate, Format, Shape
from paretune.spaces.mixed import Sensitivity
from paretune.spaces.space import Space

SHAPE = Shape(6, 256, 768, 8, 4, 32, 4096)
TEACHER_NLL = {"search": 1.80, "report": 1.87}
DOCUMENTS, TOKENS = 8, 1000
# Milliseconds: constant, per layer, per million weights of each kernel (KERNEL_BITS) in layers and head, per cache.
COSTS = (
    *(0.1, 0.2),
    *(0.04, 0.02, 0.02, 0.015, 0.012, 0.02, 0.02, 0.018, 0.02),
    *(0.018, 0.012, 0.012, 0.008, 0.01, 0.012, 0.012, 0.01, 0.012),
    0.005,
)
WEIGHT_BYTES = {2: 0.3, 4: 0.55, 8: 1.0, 32: 4.0}
LOSS = {2: 0.2, 4: 0.012, 8: 0.0005, 16: 0.0, 32: 0.0}
SECONDS = {"fit": 20.0, "elastic": 30.0, "sensitivity": 3.0, "rung0": 1.0, "recover": 9.0, "confirm": 5.0}
SLEEP = "PARETUNE_SIMULATED_SLEEP"


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedEvaluator(Evaluator):
    """Deterministic outcomes; `clock` (inline) advances by what the task would take, a real worker sleeps PARETUNE_SIMULATED_SLEEP s."""

    def __init__(self, folder: Path, home: Path, clock: VirtualClock | None = None) -> None:
        setup = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
        self.folder, self.home, self.clock = folder, home, clock
        self.spec = Spec.model_validate(setup["spec"])
        self.profile = Profile.model_validate(setup["profile"])
        self.space = Space.of(
            SHAPE,
            self.profile.weight_formats,
            second_order=self.spec.second_order,
            choices=self.spec.choices,
            hidden=self.spec.hidden,
        )
        self.log = folder / "simulated.log"

    def run(self, task: Task) -> Outcome[Any]:
        """Return the task's outcome. The task is noted in simulated.log, so that a test can count what was done."""
        if self.clock is not None:
            self.clock.now += SECONDS[task.kind]
        time.sleep(float(os.environ.get(SLEEP, "0")))
        name = "" if task.subject is None else task.subject.key
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(f"{task.kind} {name}\n")
        return super().run(task)

    def fit(self, task: Fit) -> Outcome[FitResult]:
        """Every designed candidate, by the law."""
        kept = [
            {"candidate": json.loads(c.to_json()), "decode_ms_per_token": decode_ms(c), "ttft_ms": 10 * decode_ms(c)}
            for c in task.designed
            if isinstance(c, Candidate)
        ]
        return Outcome(result=FitResult(tuple(kept)))

    def elastic(self, task: Elastic) -> Outcome[ElasticResult]:
        """A student that is trained at once."""
        return Outcome(result=ElasticResult(30.0, 100_000.0, 4096, seconds=30.0))

    def sensitivity(self, task: MeasureSensitivity) -> Outcome[SensitivityResult]:
        """Every group by the law of its precision."""
        return Outcome(result=SensitivityResult(sensitivity(task.formats), SECONDS["sensitivity"]))

    def explore(self, task: Explore) -> Outcome[EvaluationResult]:
        """The loss of the law."""
        candidate = _decoder(task)
        size = compressed_size(candidate)
        found = {"bytes": Measurement.exact(size, "bytes"), "compressed_bytes": Measurement.exact(size, "bytes")}
        return Outcome(result=EvaluationResult(_scores("search", loss(candidate)), found))

    def recover(self, task: Recover) -> Outcome[RecoverResult]:
        """Training leaves 60 % of what cuts and zeros cost, and of what rounding costs only if it sees the rounding."""
        candidate = _decoder(task)
        choice = not_eligible(candidate)
        if may_escalate(candidate) and task.context is not None:
            ptq, exact = (
                TEACHER_NLL["search"] + recovered_loss(candidate, c) for c in (candidate, unrounded(candidate))
            )
            choice = escalate(PtqResult(ptq, exact, ptq - exact), task.context)
        increase = 0.6 * loss(candidate) if choice.qat else recovered_loss(candidate, candidate)
        recovered = Recovered("", 40_960.0, choice.qat, choice.reason)
        return Outcome(result=RecoverResult(_scores("search", increase), recovered=recovered))

    def confirm(self, task: Confirm) -> Outcome[EvaluationResult]:
        """The law's latency and the loss that training has left."""
        candidate, recovered = _decoder(task), task.recovered
        increase = 0.6 * loss(candidate) if recovered and recovered.qat else recovered_loss(candidate, candidate)
        scores = _scores("report", increase if recovered else loss(candidate))
        quality = quality_measurements(scores, _scores("report", 0.0), 3.0, "simulated")
        decode, size = decode_ms(candidate), compressed_size(candidate)
        benchmark = {
            name: Measurement(value, unit, value * 0.99, value * 1.01, "measured", 12, "simulated")
            for name, value, unit in (("decode_ms_per_token", decode, "ms/token"), ("ttft_ms", 10 * decode, "ms"))
        }
        benchmark |= following(benchmark["decode_ms_per_token"], self.profile)
        exact = {name: Measurement.exact(size, "bytes") for name in ("bytes", "compressed_bytes", "peak_memory_bytes")}
        folder = self.folder / "artifacts" / candidate.key
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "paretune.json").write_text(
            json.dumps({"candidate": json.loads(candidate.to_json())}), encoding="utf-8"
        )
        write_checksums(folder)
        facts: dict[str, Any] = {"search_nll": TEACHER_NLL["search"] + loss(candidate)}
        if recovered:
            facts |= {"qat": recovered.qat, "qat_reason": recovered.qat_reason}
        artifact = (str(folder), sha256(folder / CHECKSUMS))
        return Outcome(result=EvaluationResult(scores, {**quality, **benchmark, **exact}, facts, artifact))


def loss(candidate: Candidate) -> float:
    """NLL increase in nats/token: cuts, sparsity and rounding add up, with a little noise per candidate."""
    x = candidate.layers[0]
    cut = (
        1.2 * (1 - len(candidate.layers) / SHAPE.layers) ** 1.5
        + 0.4 * (1 - x.ffn / SHAPE.ffn)
        + 0.3 * (1 - x.kv_groups / SHAPE.kv_heads)
        + 0.8 * (1 - candidate.width(SHAPE) / SHAPE.hidden)
    )
    weights = _layer_weights(len(candidate.layers))
    rounding = _rounding(candidate.head_format) + sum(
        weight * (_rounding(layer.attention_format) + _rounding(layer.ffn_format))
        for weight, layer in zip(weights, candidate.layers, strict=True)
    )
    noise = int(hashlib.sha256(candidate.key.encode()).hexdigest()[:4], 16) / 65535
    changed = cut + rounding + x.pattern.ratio > 0
    return float(cut + rounding + 0.5 * x.pattern.ratio**2 + (0.002 * noise if changed else 0.0))


def sensitivity(formats: tuple[Format, ...]) -> Sensitivity:
    """The table that `loss` implies; layers are kept in their order."""
    losses = [tuple(weight * _rounding(f) for f in formats) for weight in _layer_weights(SHAPE.layers)]
    nothing = (0.0,) * len(formats)
    return Sensitivity(formats, tuple(losses), tuple(losses), tuple(map(_rounding, formats)), nothing)


def _rounding(form: Format) -> float:
    return LOSS[form.bits] * (1.0 if form.algorithm == "rtn" else 0.7)


def _layer_weights(depth: int) -> list[float]:
    """The share of each layer in what rounding loses: early layers are more sensitive."""
    return [2 * (depth - i) / (depth * (depth + 1)) for i in range(depth)]


def recovered_loss(trained: Candidate, shipped: Candidate) -> float:
    """What is left of the loss when training did not see the rounding of `shipped`, a form of what was `trained`."""
    rounding = loss(trained) - loss(unrounded(trained))
    return 0.6 * loss(unrounded(trained)) + (rounding if shipped.is_quantized else 0.0)


def decode_ms(candidate: Candidate) -> float:
    """A linear law in the terms of the latency fit."""
    return float(features(candidate, SHAPE) @ COSTS)


def compressed_size(candidate: Candidate) -> float:
    """Bytes of weights by the bits of their kernels, zeros half as dear."""
    found, n = features(candidate, SHAPE), len(KERNEL_BITS)
    each = [WEIGHT_BYTES[bits] for bits in KERNEL_BITS.values()]
    weights = found[2 : 2 + n] @ each * (1 - 0.5 * candidate.layers[0].pattern.ratio)
    return float(math.ceil(1e6 * (weights + found[2 + n : 2 + 2 * n] @ each + candidate.embedding_format.bits / 8)))


def _decoder(task: EvaluationTask[Any]) -> Candidate:
    assert isinstance(task.candidate, Candidate)
    return task.candidate


def _scores(split: str, increase: float) -> Scores:
    documents = tuple(f"{split}{i}" for i in range(DOCUMENTS))
    nll = tuple(TOKENS * (TEACHER_NLL[split] + increase) * (0.9 + 0.2 * i / (DOCUMENTS - 1)) for i in range(DOCUMENTS))
    return Scores(documents, nll, (TOKENS,) * DOCUMENTS)
