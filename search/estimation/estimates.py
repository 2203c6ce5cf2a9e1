"""What the sampler and the choice of finalists are told: estimates from rung-0 scores, the latency fit and the calibration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paretune.objectives.directions import excess, minimized
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import MetricNames
from paretune.objectives.prediction.latency_fit import MIN_POINTS, LatencyFit
from paretune.objectives.prediction.memory_fit import MemoryFit, resident_bytes
from paretune.objectives.quality.quality import Scores, relative
from paretune.search.escalation import QatContext
from paretune.search.estimation.calibration import Calibration, Pair
from paretune.search.estimation.derived_metrics import MEMORY, followed, memory_fit, profile_of
from paretune.search.estimation.finalists import Explored, perceived
from paretune.search.estimation.ledger import Ledger
from paretune.search.front import Vector
from paretune.search.spec import Spec
from paretune.search.study.records import Evaluation
from paretune.search.study.store import Store
from paretune.spaces.kinds import AnyCandidate, AnySpace, candidate_from_dict


class Estimates:
    """`version` counts how often fit or calibration have changed: everything told under another version is stale."""

    def __init__(self, store: Store, spec: Spec, space: AnySpace, ledger: Ledger) -> None:
        self.store, self.spec, self.space, self.ledger = store, spec, space, ledger
        self.figures = MetricNames.of(store.meta("figures"))
        self._profile = profile_of(store.meta("profile"))
        self._memory: MemoryFit | None = None
        self.version = 0
        self.baselines: tuple[AnyCandidate, ...] = tuple(space.baselines())
        self.teacher_key = self.baselines[0].key
        self.fits: dict[str, LatencyFit] = {}
        self._calibration = Calibration(space.shape, [])
        self._vectors: dict[str, tuple[int, Vector]] = {}
        if store.meta("fit_done") is True:
            self.refit()
        self.calibrate()

    def predictions(self, candidate: AnyCandidate) -> dict[str, Measurement]:
        """Latencies by the fit, and what follows from them."""
        fitted = {name: fit.predict(candidate) for name, fit in self.fits.items()}
        return followed(fitted, self._profile, self.figures)

    def completed(self, candidate: AnyCandidate, found: Mapping[str, Measurement]) -> dict[str, Measurement]:
        """What rung 0 found, with latencies, what follows from them, and peak memory."""
        completed = {**found, **self.predictions(candidate)}
        if self._memory is not None and "bytes" in found:
            resident = resident_bytes(candidate, self.space.shape, found["bytes"].value)
            completed[MEMORY] = self._memory.predict(resident)
        return completed

    def vector(self, key: str) -> Vector | None:
        """Estimated objectives of an explored candidate, or None if it failed or waits."""
        known = self._vectors.get(key)
        if known is not None and known[0] == self.version:
            return known[1]
        e = self.ledger.latest.get((key, "rung0"))
        if e is None or e.status != "complete" or e.scores is None:
            return None
        candidate = self.ledger.rows[key].candidate
        estimate = {self.figures.quality: self.estimated_nll(candidate, e.scores)}
        vector = self._minimized({**self.completed(candidate, e.measurements), **estimate})
        self._vectors[key] = (self.version, vector)
        return vector

    def constraints(self, key: str) -> dict[str, float]:
        """Amount by which each limit of the spec is exceeded (feasible at or below 0), as a fraction of the limit."""
        e = self.ledger.latest[key, "rung0"]
        assert e.scores is not None
        candidate = self.ledger.rows[key].candidate
        known = self.completed(candidate, e.measurements)
        teacher = self._teacher_nll()[1]
        loss = relative(self.estimated_nll(candidate, e.scores).value - teacher, teacher)
        found = {"loss": loss / self.spec.loss_of_interest - 1}
        for name, limit in sorted(self.spec.limits.items()):
            found[name] = excess(name, known[name].value, limit)
        return found

    def estimated_nll(self, candidate: AnyCandidate, scores: Scores) -> Measurement:
        """Calibrated estimate of the confirmed NLL (or a plug-in's quality) on the report split."""
        search, report = self._teacher_nll()
        scale = self._scale
        value = report + scale * self._calibration.estimate(candidate, (scores.mean_nll - search) / scale)
        spread = 2.9 * scale * (self._calibration.error if self._calibration.pairs else 0.1)
        return Measurement(
            value,
            self.figures.quality_unit,
            value - spread,
            value + spread,
            "predicted",
            self._calibration.pairs,
            "",
            "rung-0 score calibrated to confirmed values"
            if self._calibration.pairs >= 4
            else "rung-0 score, not calibrated yet",
        )

    def params(self, key: str) -> dict[str, Any]:
        """What the sampler proposed for a candidate."""
        return self.ledger.rows[key].params

    def explored(self) -> list[Explored]:
        """Explored candidates that are worth confirming: within the limits and the loss of interest."""
        found = []
        for key in self.ledger.explored_keys():
            vector = self.vector(key)
            if vector is not None and all(v <= 0 for v in self.constraints(key).values()):
                found.append(Explored(key, self.ledger.rows[key].candidate.stratum, vector))
        return found

    def confirmed_vector(self, e: Evaluation) -> Vector:
        """Objectives of a confirmed candidate."""
        return self._minimized(e.measurements)

    def _minimized(self, found: Mapping[str, Measurement]) -> Vector:
        return tuple(minimized(name, float(found[name].value)) for name in self.spec.objectives)

    def perceived(self, vector: Vector) -> Vector:
        """Objectives on the scales that finalists are spread over."""
        return perceived(vector, self.spec.objectives.index(self.figures.quality), self._teacher_nll()[1])

    def qat_context(self, key: str) -> QatContext | None:
        """What decides whether training under the rounding is worth it for an explored candidate."""
        estimate = self.vector(key)
        if estimate is None or not self.figures.is_decoder:
            return None
        search, report = self._teacher_nll()
        confirmed = [self.confirmed_vector(e) for e in self.ledger.complete("confirmed")]
        return QatContext.of(
            self.spec.objectives,
            estimate,
            confirmed,
            teacher_search=search,
            teacher_report=report,
            qat_threshold=self.spec.qat_threshold,
        )

    def learn(self, candidate: AnyCandidate, measurements: dict[str, Measurement]) -> None:
        """A confirmation sharpens the calibration and the latency fit."""
        points = self.store.meta("fit_points", [])
        if measurements[self.figures.latency].provenance == "measured" and self.store.meta("fit_done") is True:
            points.append(
                {
                    "candidate": json.loads(candidate.to_json()),
                    **{n: measurements[n].value for n, _ in self.figures.latencies},
                }
            )
            self.store.set_meta(fit_points=points)
            self.refit()
        self.calibrate()
        self.write(list(self.ledger.rows))

    def refit(self) -> None:
        """Fit the latencies anew, once there are MIN_POINTS measurements."""
        points = [(candidate_from_dict(p["candidate"]), p) for p in self.store.meta("fit_points", [])]
        if len(points) < MIN_POINTS:
            return
        self.fits = {
            name: LatencyFit(name, unit, self.space.shape, [(c, p[name]) for c, p in points])
            for name, unit in self.figures.latencies
        }
        self.store.set_meta(fit_error={name: fit.error.__dict__ for name, fit in self.fits.items()})
        self.version += 1

    def calibrate(self) -> None:
        """Calibrate rung 0 anew by all confirmed candidates."""
        search, report = self._teacher_nll() if self._teacher_scores() is not None else (0.0, 0.0)
        pairs = []
        for e in self.ledger.complete("confirmed"):
            rung0 = self.ledger.latest.get((e.key, "rung0"))
            if (
                rung0 is not None
                and rung0.scores is not None
                and e.scores is not None
                and self.ledger.rows[e.key].source != "baseline"
            ):
                before, after = rung0.scores.mean_nll - search, e.scores.mean_nll - report
                scale = self._scale
                pairs.append(Pair(self.ledger.rows[e.key].candidate, before / scale, after / scale))
        self._calibration = Calibration(self.space.shape, pairs)
        confirmed = self.ledger.complete("confirmed")
        self._memory = memory_fit(((self.ledger.rows[e.key].candidate, e) for e in confirmed), self.space.shape)
        if pairs:
            self.store.set_meta(calibration=self._calibration.to_dict())
        self.version += 1

    def write(self, keys: list[str]) -> None:
        """Keep the current estimates beside the rung-0 rows, for everyone who reads the store."""
        fresh = {}
        for key in keys:
            e = self.ledger.latest.get((key, "rung0"))
            if e is not None and e.status == "complete" and e.scores is not None:
                candidate = self.ledger.rows[key].candidate
                fresh[key] = {
                    **self.completed(candidate, e.measurements),
                    self.figures.estimate: self.estimated_nll(candidate, e.scores),
                }
        self.store.update_measurements("rung0", fresh)

    @property
    def _scale(self) -> float:
        """What the calibration takes as 1: a nat per token, or the teacher's own value of a plug-in's quality."""
        return 1.0 if self.figures.is_decoder else abs(self._teacher_nll()[1]) or 1.0

    def _teacher_scores(self) -> Scores | None:
        e = self.ledger.latest.get((self.teacher_key, "confirmed"))
        return None if e is None or e.status != "complete" else e.scores

    def _teacher_nll(self) -> tuple[float, float]:
        """The fp32 teacher's NLL (or a plug-in's quality, minimized) on the search and on the report split."""
        e = self.ledger.latest[self.teacher_key, "confirmed"]
        assert e.scores is not None
        return float(e.facts[f"search_{self.figures.quality}"]), e.scores.mean_nll
