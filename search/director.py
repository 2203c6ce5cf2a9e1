"""Decides what is due, writes what came of it into the store. No Ray, no Optuna, no torch in here.

Order: the baselines are confirmed, the latency fit is measured, the elastic student trained; then rung-0 candidates and
recoveries with confirmations take turns by their shares of the budget. Everything it knows it reads from the store, so
resuming is asking again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from paretune.objectives.latency_fit import MIN_POINTS, LatencyFit, design
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality import Scores
from paretune.search.budget import Budget
from paretune.search.calibration import Calibration, Pair
from paretune.search.finalists import Explored, next_finalist
from paretune.search.front import Vector
from paretune.search.spec import Spec
from paretune.search.store import CandidateRow, Evaluation, Fidelity, Store
from paretune.search.work import Kind, Outcome, Work
from paretune.spaces.candidate import Candidate
from paretune.spaces.mixed import Sensitivity
from paretune.spaces.space import Space

MAX_ATTEMPTS = 3
FIRST_WAVE = 40
MOST_FAILURES_IN_A_ROW = 8
CONFIRM_GUESS_S, RUNG0_GUESS_S = 8.0, 2.0  # of a model of REFERENCE_PARAMETERS on two cores
REFERENCE_PARAMETERS = 5.8e6
STAGE = {
    "fit": "latency fit",
    "elastic": "elastic student",
    "sensitivity": "sensitivity",
    "rung0": "explore",
    "recover": "recover and confirm",
    "confirm": "recover and confirm",
}
FIDELITY: dict[str, Fidelity] = {"rung0": "rung0", "recover": "recovered", "confirm": "confirmed"}


@dataclass(frozen=True)
class Decision:
    """`work` is due, a proposal is wanted ("propose"), something must finish first ("wait"), or all is "done"."""

    kind: Literal["work", "propose", "wait", "done"]
    work: Work | None = None
    reason: str = ""


class Director:
    """The search's policy over one study. One piece of work is out at a time."""

    def __init__(
        self,
        store: Store,
        spec: Spec,
        space: Space,
        budget: Budget,
        notify: Callable[[str, dict[str, Any]], None] = lambda _kind, _data: None,
    ) -> None:
        self.store, self.spec, self.space, self.budget, self.notify = store, spec, space, budget, notify
        self.out: Work | None = None
        self.stop_reason: str | None = None
        self.exit_code = 0
        self.is_interrupted = False
        self.version = 0
        self._scale = max(1.0, space.shape.parameters / REFERENCE_PARAMETERS)
        self._failures_in_a_row = self._lost_tables = 0
        self._rows: dict[str, CandidateRow] = {}
        self._latest: dict[tuple[str, Fidelity], Evaluation] = {}
        self._vectors: dict[str, tuple[int, Vector]] = {}
        self._fits: dict[str, LatencyFit] = {}
        self._calibration = Calibration(space.shape, [])
        self._load()

    # what is due

    def next(self) -> Decision:
        """The next thing to do."""
        if self.out is not None:
            return Decision("wait")
        if self.stop_reason is not None:
            return Decision("done", reason=self.stop_reason)
        if self.budget.left_s <= 0:
            return self._end("the budget has ended")
        baseline = self._baseline_due()
        if baseline is not None:
            return self._hand_out("confirm", baseline)
        if self.store.meta("fit_done") is not True:
            return self._hand_out("fit", None, {"design": self._design(), "seconds": self._fit_seconds()})
        if self.store.meta("elastic", {}).get("done") is not True:
            return self._hand_out("elastic", None)
        if self.space.has_mixed and self.space.sensitivity is None:
            return self._hand_out(
                "sensitivity", None, {"formats": [dataclasses.asdict(f) for f in self.space.mixed_formats]}
            )
        return self._explore_or_confirm()

    def register(self, candidate: Candidate, source: str, params: dict[str, Any], **meta: Any) -> Work | None:
        """Take a proposal: rung-0 work, or None if the store already has this candidate."""
        if not self.store.add_candidate(candidate, source, params, **meta):
            return None
        self._rows[candidate.key] = CandidateRow(candidate.key, len(self._rows), source, candidate, params)
        return self._hand_out("rung0", candidate).work

    def _baseline_due(self) -> Candidate | None:
        for candidate in self.space.baselines():
            if candidate.key not in self._rows:
                params = self.space.encode(candidate)
                self.store.add_candidate(candidate, "baseline", params)
                self._rows[candidate.key] = CandidateRow(candidate.key, len(self._rows), "baseline", candidate, params)
            if self._open(candidate.key, "confirmed"):
                return candidate
        return None

    def _explore_or_confirm(self) -> Decision:
        waiting = next(
            (
                key
                for (key, fidelity), e in self._latest.items()
                if fidelity == "recovered" and e.status == "complete" and self._open(key, "confirmed")
            ),
            None,
        )
        left, cost = self.budget.left_s, self._confirm_cost_s()
        if waiting is not None:
            if left < self._typical_seconds("confirmed", self._scale * CONFIRM_GUESS_S):
                return self._end("the budget has ended")
            return self._hand_out(
                "confirm", self._rows[waiting].candidate, {"recovered": self._latest[waiting, "recovered"].facts}
            )
        pending = next(
            (row for row in self._rows.values() if row.source != "baseline" and self._open(row.key, "rung0")), None
        )
        if pending is not None:
            return self._hand_out("rung0", pending.candidate)
        number, finalist = len(self.explored_keys()), None
        most = self.spec.max_candidates
        if left >= cost and number >= min(FIRST_WAVE, most) and (number >= most or self._confirm_is_behind()):
            finalist = self._next_finalist()
        can_explore = number < most and not self.store.meta("exhausted", False)
        if (
            finalist is None
            and can_explore
            and left >= cost + self._typical_seconds("rung0", self._scale * RUNG0_GUESS_S)
        ):
            return Decision("propose")
        if finalist is None and left >= cost:
            finalist = self._next_finalist()
        if finalist is None:
            again = self._disturbed()
            if again is not None and left >= self._typical_seconds("confirmed", self._scale * CONFIRM_GUESS_S):
                recovered = self._latest.get((again, "recovered"))
                return self._hand_out(
                    "confirm", self._rows[again].candidate, {"recovered": recovered.facts} if recovered else {}
                )
            return self._end("all is done" if left >= cost else "the budget has ended")
        return self._hand_out("recover", self._rows[finalist].candidate, {"tokens": self._recovery_tokens()})

    def _disturbed(self) -> str | None:
        """A confirmed candidate whose latency was disturbed, baselines first: what is left of the budget measures it again."""
        for key in self._rows:
            e = self._latest.get((key, "confirmed"))
            if e is None or e.status != "complete" or e.attempt >= MAX_ATTEMPTS:
                continue
            if e.measurements["decode_ms_per_token"].provenance == "disturbed":
                return key
        return None

    def _confirm_is_behind(self) -> bool:
        """Whether the next confirmation is due by the two stages' shares of the time."""
        shares = self.spec.shares
        later = self.budget.used("recover and confirm") + self._confirm_cost_s() / 2
        return later / shares.confirm <= self.budget.used("explore") / shares.explore

    def _next_finalist(self) -> str | None:
        chosen = [key for (key, fidelity) in self._latest if fidelity == "recovered"]
        if len(chosen) >= self.spec.finalists * 4:
            return None
        again = next((key for key in chosen if self._open(key, "recovered")), None)
        confirmed = [self._confirmed_vector(e) for e in self._complete("confirmed")]
        return again or next_finalist(self._explored(), chosen, confirmed)

    def _recovery_tokens(self) -> int:
        """The same for every finalist of a study: what their share of the budget allows, by the speed of the elastic training."""
        tokens = self.store.meta("recovery_tokens")
        if tokens is None:
            elastic = self.store.meta("elastic", {})
            rate = 1.3 * elastic.get("tokens", 0) / max(1.0, elastic.get("elapsed_s", 1.0)) or 2000.0
            shares = self.spec.shares
            share = (
                (self.budget.left_s + self.budget.used("explore")) * shares.confirm / (shares.confirm + shares.explore)
            )
            each = max(
                2.0,
                share / self.spec.finalists
                - self._typical_seconds("confirmed", self._scale * CONFIRM_GUESS_S)
                - 2 * self._scale * RUNG0_GUESS_S,
            )
            step = elastic.get("batch_tokens", 4096)
            tokens = max(4, round(each * rate / step)) * step
            self.store.set_meta(recovery_tokens=tokens)
        return int(tokens)

    def _confirm_cost_s(self) -> float:
        elastic = self.store.meta("elastic", {})
        rate = 1.3 * elastic.get("tokens", 0) / max(1.0, elastic.get("elapsed_s", 1.0)) or 2000.0
        guess = self._recovery_tokens() / rate + 2 * self._scale * RUNG0_GUESS_S
        return 1.15 * (
            self._typical_seconds("recovered", guess)
            + self._typical_seconds("confirmed", self._scale * CONFIRM_GUESS_S)
        )

    def _typical_seconds(self, fidelity: Fidelity, guess: float) -> float:
        """Median of the last few; the first baseline also opens the lane and loads everything, and is no guide."""
        seconds = [e.seconds for e in self._complete(fidelity)]
        return statistics.median(seconds[-5:]) if seconds else guess

    def _hand_out(self, kind: Kind, candidate: Candidate | None, options: dict[str, Any] | None = None) -> Decision:
        left = self.budget.left_s
        timeout = self._scale * {"rung0": 120.0, "confirm": 900.0, "fit": 300.0, "elastic": 300.0}.get(
            kind, left + 60.0
        )
        work = Work(kind, candidate, left, min(timeout, left + 20.0), options or {})
        if candidate is not None:
            self.store.start(candidate.key, FIDELITY[kind])
        self.out = work
        return Decision("work", work)

    def _end(self, reason: str) -> Decision:
        self.stop_reason = reason
        return Decision("done", reason=reason)

    # what came of it

    def progressed(self, work: Work, outcome: Outcome, seconds: float) -> None:
        """A report on the way (fit, elastic)."""
        self._charge(work, seconds)
        if work.kind == "elastic":
            self.store.set_meta(elastic={**outcome.facts, "done": False})
        self.notify("progress", {"kind": work.kind, **{k: v for k, v in outcome.facts.items() if k != "kept"}})

    def completed(self, work: Work, outcome: Outcome, seconds: float) -> None:
        """The end of a piece of work, however it ended."""
        self.out = None
        self._charge(work, seconds)
        if outcome.status == "fatal":
            self._give_up(outcome.reason, outcome.exit_code)
        if work.kind == "fit":
            self._fit_came_back(outcome)
        elif work.kind == "elastic":
            self._elastic_came_back(outcome)
        elif work.kind == "sensitivity":
            self._sensitivity_came_back(outcome)
        else:
            assert work.candidate is not None
            self._evaluation_came_back(work, work.candidate, outcome, seconds)
        self._watch_failures(outcome)

    def lost(self, work: Work, reason: str, seconds: float) -> None:
        """The worker died or hung; the work becomes due again until it has failed MAX_ATTEMPTS times."""
        self.out = None
        self._charge(work, seconds)
        self.store.event("lost", f"{work.kind} lost: {reason}")
        if work.candidate is not None:
            fidelity = FIDELITY[work.kind]
            attempts = self._latest.get((work.candidate.key, fidelity))
            final = attempts is not None and attempts.attempt + 1 >= MAX_ATTEMPTS
            self.store.finish(
                work.candidate.key, fidelity, "failed" if final else "lost", reason=reason, seconds=seconds
            )
            self._refresh(work.candidate.key, fidelity)
            self._require_teacher(work.candidate.key, reason)
        if work.kind == "sensitivity" and self.stop_reason is None:
            self._lost_tables += 1
            if self._lost_tables >= MAX_ATTEMPTS:
                self._sensitivity_came_back(Outcome("failed", reason=reason))
        self._watch_failures(Outcome("failed", reason=reason))
        self.notify("lost", {"kind": work.kind, "reason": reason})

    def interrupt(self) -> None:
        """End in good order: nothing new is handed out."""
        self.is_interrupted = True
        self.stop_reason, self.exit_code = "interrupted", 130

    def _fit_seconds(self) -> float:
        """The fit's part of the budget: what the shares leave, at least long enough for a few points."""
        shares = self.spec.shares
        return max(15.0, (1 - shares.elastic - shares.explore - shares.confirm) * self.budget.total_s)

    def _fit_came_back(self, outcome: Outcome) -> None:
        if outcome.status != "complete":
            self._give_up(f"the latency fit could not be measured: {outcome.reason}", 1)
            return
        self.store.set_meta(fit_done=True, fit_points=outcome.facts["kept"])
        self._refit()
        if not self._fits:
            self._give_up("the machine was too busy to measure anything for the latency fit", 5)
        if outcome.facts.get("disturbed"):
            self.store.event(
                "fit",
                f"{outcome.facts['disturbed']} of the fit's measurements were disturbed by other work; predictions are rough",
            )
        for name, fit in self._fits.items():
            self.store.event(
                "fit",
                f"latency fit of {name}: held-out error {fit.error.median:.1%} median, {fit.error.worst:.1%} worst, Kendall tau "
                f"{fit.error.kendall_tau:.2f} (parameters x bits: {fit.error.params_bits_tau:.2f}) over {fit.error.points} measurements",
            )
        self.notify("fit", {name: fit.error.__dict__ for name, fit in self._fits.items()})

    def _elastic_came_back(self, outcome: Outcome) -> None:
        if outcome.status != "complete":
            if self.budget.left_s > 1:
                self._give_up(f"the elastic student could not be trained: {outcome.reason}", 1)
            return
        self.store.set_meta(elastic={**outcome.facts, "done": True})
        kept = (
            "taken from an earlier search"
            if outcome.facts["kept"]
            else f"trained for {outcome.facts['elapsed_s']:.0f} s on {outcome.facts['tokens']:,.0f} tokens"
        )
        self.store.event("elastic", f"elastic student {kept}")
        self.notify("elastic", {"done": True, **outcome.facts})

    def _sensitivity_came_back(self, outcome: Outcome) -> None:
        """The table opens the mixed part of the space; without it the search goes on with uniform precision."""
        if outcome.status == "complete":
            self.store.set_meta(sensitivity=outcome.facts)
            table = Sensitivity.from_dict(outcome.facts["table"])
            group, form, loss = table.worst()
            told = "taken from an earlier search" if outcome.facts["kept"] else "measured"
            self.store.event(
                "sensitivity", f"sensitivity table {told}; {group} in {form.label} loses most, {loss:.3g} nats"
            )
        elif outcome.status != "fatal":
            self.store.set_meta(sensitivity={"table": None, "reason": outcome.reason})
            self.store.event("sensitivity", f"no mixed precision is searched: {outcome.reason}")
        self._open_mixed()
        self.notify(
            "sensitivity", {"reason": outcome.reason, **{k: v for k, v in outcome.facts.items() if k != "table"}}
        )

    def _open_mixed(self) -> None:
        known = self.store.meta("sensitivity")
        if known is not None and self.space.has_mixed:
            table = None if known["table"] is None else Sensitivity.from_dict(known["table"])
            self.space = dataclasses.replace(self.space, mixed=table is not None, sensitivity=table)
            self.version += 1

    def _evaluation_came_back(self, work: Work, candidate: Candidate, outcome: Outcome, seconds: float) -> None:
        fidelity = FIDELITY[work.kind]
        measurements = dict(outcome.measurements)
        if fidelity == "rung0" and outcome.status == "complete":
            measurements |= self.predictions(candidate)
        status: Any = "lost" if outcome.status == "fatal" else outcome.status
        artifact = (
            None if outcome.artifact is None else (self.store.folder / "artifacts" / candidate.key, outcome.artifact[1])
        )
        self.store.finish(
            candidate.key,
            fidelity,
            status,
            measurements=measurements,
            scores=outcome.scores,
            facts=outcome.facts,
            reason=outcome.reason,
            seconds=seconds,
            publish=fidelity == "confirmed" and status == "complete",
            artifact=artifact,
        )
        self._refresh(candidate.key, fidelity)
        self._require_teacher(candidate.key, outcome.reason)
        if fidelity == "confirmed" and status == "complete":
            self._learn(candidate, measurements)
        elif fidelity == "rung0" and status == "complete":
            self._write_estimates([candidate.key])
        self.notify(fidelity, {"key": candidate.key, "status": status, "reason": outcome.reason})

    def _learn(self, candidate: Candidate, measurements: dict[str, Measurement]) -> None:
        """A confirmation sharpens the calibration and the latency fit."""
        points = self.store.meta("fit_points", [])
        if measurements["decode_ms_per_token"].provenance == "measured" and self.store.meta("fit_done") is True:
            points.append(
                {
                    "candidate": json.loads(candidate.to_json()),
                    **{n: measurements[n].value for n in ("decode_ms_per_token", "ttft_ms")},
                }
            )
            self.store.set_meta(fit_points=points)
            self._refit()
        self._calibrate()
        self._write_estimates(list(self._rows))

    def _require_teacher(self, key: str, reason: str) -> None:
        """Nothing can be judged without the fp32 teacher: if it cannot be confirmed, the search ends."""
        if key == self.space.baselines()[0].key and self.stop_reason is None:
            e = self._latest[key, "confirmed"]
            if e.status in ("failed", "infeasible"):
                self._give_up(f"the teacher itself could not be confirmed: {reason}", 4)

    def _watch_failures(self, outcome: Outcome) -> None:
        self._failures_in_a_row = 0 if outcome.status == "complete" else self._failures_in_a_row + 1
        if self._failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
            self._give_up(
                f"{self._failures_in_a_row} evaluations failed in a row, the last one with: {outcome.reason}", 4
            )

    def _give_up(self, reason: str, exit_code: int) -> None:
        self.stop_reason, self.exit_code = reason, exit_code
        self.store.event("stopped", reason)

    def _charge(self, work: Work, seconds: float) -> None:
        stage = (
            "baselines"
            if work.kind == "confirm"
            and work.candidate is not None
            and self._rows[work.candidate.key].source == "baseline"
            else STAGE[work.kind]
        )
        self.budget.charge(stage, seconds)
        self.store.set_meta(spent_s=self.budget.elapsed_s, seconds_by_stage=self.budget.stages)

    # what the sampler and the finalists are told

    def predictions(self, candidate: Candidate) -> dict[str, Measurement]:
        """Latencies by the fit."""
        return {name: fit.predict(candidate) for name, fit in self._fits.items()}

    def vector(self, key: str) -> Vector | None:
        """Estimated objectives of an explored candidate, or None if it failed or waits."""
        known = self._vectors.get(key)
        if known is not None and known[0] == self.version:
            return known[1]
        e = self._latest.get((key, "rung0"))
        if e is None or e.status != "complete" or e.scores is None:
            return None
        candidate = self._rows[key].candidate
        values = {**e.measurements, **self.predictions(candidate), "nll": self.estimated_nll(candidate, e.scores)}
        vector = tuple(float(values[name].value) for name in self.spec.objectives)
        self._vectors[key] = (self.version, vector)
        return vector

    def constraints(self, key: str) -> dict[str, float]:
        """Amount by which each limit of the spec is exceeded (feasible at or below 0), as a fraction of the limit."""
        e = self._latest[key, "rung0"]
        assert e.scores is not None
        candidate = self._rows[key].candidate
        known = {**e.measurements, **self.predictions(candidate)}
        teacher = self._teacher_nll()[1]
        loss = self.estimated_nll(candidate, e.scores).value / teacher - 1
        found = {"loss": loss / self.spec.loss_of_interest - 1}
        for name, limit in sorted(self.spec.limits.items()):
            found[name] = known[name].value / limit - 1
        return found

    def estimated_nll(self, candidate: Candidate, scores: Scores) -> Measurement:
        """Calibrated estimate of the confirmed NLL on the report split."""
        search, report = self._teacher_nll()
        value = report + self._calibration.estimate(candidate, scores.mean_nll - search)
        spread = 2.9 * (self._calibration.error if self._calibration.pairs else 0.1)
        return Measurement(
            value,
            "nats/token",
            value - spread,
            value + spread,
            "predicted",
            self._calibration.pairs,
            "",
            "rung-0 score calibrated to confirmed values"
            if self._calibration.pairs >= 4
            else "rung-0 score, not calibrated yet",
        )

    def explored_keys(self) -> list[str]:
        """Keys with a complete rung-0 evaluation in the order of their proposal."""
        return [
            key for key in self._rows if (e := self._latest.get((key, "rung0"))) is not None and e.status == "complete"
        ]

    def params(self, key: str) -> dict[str, Any]:
        return self._rows[key].params

    def exhausted(self) -> None:
        """The sampler found nothing new any more."""
        self.store.set_meta(exhausted=True)
        self.store.event("exhausted", "the sampler proposed only known candidates; exploring ends")

    def seeds(self) -> list[Candidate]:
        """Textbook candidates that every search should have seen, explored before the sampler proposes: each size cut alone and
        together, each with the engine's two integer precisions, and with two mixed ones."""
        s, found = self.space.shape, []
        widths = self.space.ffn_widths
        sizes = [
            (s.layers, widths[-1], s.kv_heads),
            (s.layers - 1, widths[-1], s.kv_heads),
            (s.layers, widths[len(widths) // 2], s.kv_heads),
            (s.layers - 1, widths[2 * len(widths) // 3], s.kv_heads),
            (max(self.space.min_depth, 2 * s.layers // 3), widths[-1], s.kv_heads),
        ]
        for depth, ffn, groups in sizes:
            for bits, head, embedding in ((8, 8, 8), (4, 8, 8), (4, 4, 8)):
                if depth < self.space.min_depth or not {bits, head, embedding} <= set(self.space.bits):
                    continue
                index = {b: i for i, b in enumerate(self.space.bits)}
                params = {
                    "depth": depth,
                    "ffn": widths.index(ffn),
                    "kv_groups": groups,
                    "pattern": "none",
                    "ratio": 0,
                    "score": "magnitude",
                    "attention_bits": index[bits],
                    "ffn_bits": index[bits],
                    "head_bits": index[head],
                    "embedding_bits": index[embedding],
                    "group_size": 0,
                }
                found.append(self.space.decode(params))
            if self.space.sensitivity is not None and depth >= self.space.min_depth:
                n = len(self.space.effective_bits)
                for level in (n // 5, n // 2):  # about 5 and 6 bits
                    mixed = {"precision_mode": "mixed", "effective_bits": level}
                    sizes_of = {"depth": depth, "ffn": widths.index(ffn), "kv_groups": groups}
                    found.append(self.space.decode(self.space.encode(self.space.baselines()[0]) | sizes_of | mixed))
        return [c for c in dict.fromkeys(found) if c.key not in self._rows]

    # from the store

    def _load(self) -> None:
        self._rows = {row.key: row for row in self.store.candidates()}
        for e in self.store.evaluations():
            self._keep(e)
        first = self.space.baselines()[0].key
        if (first, "confirmed") in self._latest:
            self._require_teacher(first, self._latest[first, "confirmed"].reason)
        self._open_mixed()
        if self.store.meta("fit_done") is True:
            self._refit()
        self._calibrate()

    def _refresh(self, key: str, fidelity: Fidelity) -> None:
        self._keep([e for e in self.store.evaluations_of(key) if e.fidelity == fidelity][-1])

    def _keep(self, e: Evaluation) -> None:
        """Remember an evaluation, but never in place of a complete one by an attempt to repeat it that failed."""
        known = self._latest.get((e.key, e.fidelity))
        if known is not None and known.status == "complete" and e.status != "complete":
            e = dataclasses.replace(known, attempt=e.attempt)
        self._latest[e.key, e.fidelity] = e

    def _complete(self, fidelity: Fidelity) -> list[Evaluation]:
        return [e for (_, f), e in self._latest.items() if f == fidelity and e.status == "complete"]

    def _open(self, key: str, fidelity: Fidelity) -> bool:
        """Whether a candidate still wants this evaluation: never tried, or lost with attempts left."""
        e = self._latest.get((key, fidelity))
        return e is None or (e.status == "lost" and e.attempt < MAX_ATTEMPTS)

    def _design(self) -> list[dict[str, Any]]:
        points = design(self.space, self.spec.fit_points, self.spec.seed)
        return [json.loads(c.to_json()) for c in points]

    def _refit(self) -> None:
        points = [(Candidate.from_dict(p["candidate"]), p) for p in self.store.meta("fit_points", [])]
        if len(points) < MIN_POINTS:
            return
        self._fits = {
            name: LatencyFit(name, unit, self.space.shape, [(c, p[name]) for c, p in points])
            for name, unit in (("decode_ms_per_token", "ms/token"), ("ttft_ms", "ms"))
        }
        self.store.set_meta(fit_error={name: fit.error.__dict__ for name, fit in self._fits.items()})
        self.version += 1

    def _calibrate(self) -> None:
        search, report = self._teacher_nll() if self._teacher_scores() is not None else (0.0, 0.0)
        pairs = []
        for e in self._complete("confirmed"):
            rung0 = self._latest.get((e.key, "rung0"))
            if (
                rung0 is not None
                and rung0.scores is not None
                and e.scores is not None
                and self._rows[e.key].source != "baseline"
            ):
                pairs.append(
                    Pair(self._rows[e.key].candidate, rung0.scores.mean_nll - search, e.scores.mean_nll - report)
                )
        self._calibration = Calibration(self.space.shape, pairs)
        if pairs:
            self.store.set_meta(calibration=self._calibration.to_dict())
        self.version += 1

    def _write_estimates(self, keys: list[str]) -> None:
        """Keep the current estimates beside the rung-0 rows, for everyone who reads the store."""
        fresh = {}
        for key in keys:
            e = self._latest.get((key, "rung0"))
            if e is not None and e.status == "complete" and e.scores is not None:
                candidate = self._rows[key].candidate
                fresh[key] = {
                    **e.measurements,
                    **self.predictions(candidate),
                    "estimated_nll": self.estimated_nll(candidate, e.scores),
                }
        self.store.update_measurements("rung0", fresh)

    def _teacher_scores(self) -> Scores | None:
        e = self._latest.get((self.space.baselines()[0].key, "confirmed"))
        return None if e is None or e.status != "complete" else e.scores

    def _teacher_nll(self) -> tuple[float, float]:
        """The fp32 teacher's NLL on the search and on the report split."""
        e = self._latest[self.space.baselines()[0].key, "confirmed"]
        assert e.scores is not None
        return float(e.facts["search_nll"]), e.scores.mean_nll

    def _confirmed_vector(self, e: Evaluation) -> Vector:
        return tuple(float(e.measurements[name].value) for name in self.spec.objectives)

    def _explored(self) -> list[Explored]:
        found = []
        for key in self.explored_keys():
            vector = self.vector(key)
            if vector is not None and all(v <= 0 for v in self.constraints(key).values()):  # worth confirming
                found.append(Explored(key, self._rows[key].candidate.stratum, vector))
        return found
