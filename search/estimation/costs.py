"""What work costs in seconds and tokens: by what was seen in this study, before that by guesses from the model's size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from paretune.search.budget import TAIL_S, Budget
from paretune.search.estimation.ledger import Ledger
from paretune.search.spec import Spec
from paretune.search.study.records import Fidelity
from paretune.search.study.store import Store
from paretune.spaces.kinds import AnyShape

CONFIRM_GUESS_S, RUNG0_GUESS_S = 8.0, 2.0  # of a model of REFERENCE_PARAMETERS on two cores
REFERENCE_PARAMETERS = 5.8e6


class Costs:
    """Costs of one study, each in seconds of one of its `workers`."""

    def __init__(
        self,
        store: Store,
        spec: Spec,
        shape: AnyShape,
        budget: Budget,
        ledger: Ledger,
        workers: int = 1,
        threads: int | None = None,
    ) -> None:
        self.store, self.spec, self.budget, self.ledger, self.workers = store, spec, budget, ledger, workers
        self.threads = threads
        self.scale = max(1.0, shape.parameters / REFERENCE_PARAMETERS)

    def fit_seconds(self) -> float:
        """The fit's part of the budget: what the shares leave, at least long enough for a few points."""
        shares = self.spec.shares
        return max(15.0, (1 - shares.elastic - shares.explore - shares.confirm) * self.budget.total_s)

    def recovery_tokens(self) -> int:
        """Return the tokens of one recovery, from the confirm share of the budget and the elastic training's speed.

        They are kept in the study, so that every finalist gets the same number.
        """
        tokens = self.store.meta("recovery_tokens")
        if tokens is None:
            elastic = self.store.meta("elastic", {})
            rate = self._rate(elastic)
            shares = self.spec.shares
            time = self.budget.left_s + self.budget.used("explore") / self.workers
            share = time * shares.confirm / (shares.confirm + shares.explore)
            rounds = math.ceil(self.spec.finalists / self.workers)
            each = max(2.0, share / rounds - self.confirmation_s() - 2 * self.rung0_s())
            step = elastic.get("batch_tokens", 4096)
            tokens = max(4, round(each * rate / step)) * step
            self.store.set_meta(recovery_tokens=tokens)
        return int(tokens)

    def confirm_cost_s(self) -> float:
        """Seconds to recover and confirm one finalist, with a reserve."""
        elastic = self.store.meta("elastic", {})
        rate = self._rate(elastic)
        guess = self.recovery_tokens() / rate + 2 * self.rung0_s()  # it is scored before and after
        return 1.15 * (self.typical_seconds("recovered", guess) + self.confirmation_s())

    def _rate(self, elastic: Mapping[str, Any]) -> float:
        """Tokens of a recovery per second of one worker, by the speed of the elastic training and the threads then and now."""
        found = 1.3 * elastic.get("tokens", 0) / max(1.0, elastic.get("elapsed_s", 1.0)) or 2000.0
        then = elastic.get("threads")
        return float(found * self.threads / then) if self.threads and then else float(found)

    def typical_seconds(self, fidelity: Fidelity, guess: float) -> float:
        """Return the median seconds of the last five evaluations at this fidelity; `guess` before there are any.

        It is a median, so that the first baseline, which also loads everything, counts for little.
        """
        seconds = [e.seconds for e in self.ledger.complete(fidelity)]
        return statistics.median(seconds[-5:]) if seconds else guess

    def rung0_s(self) -> float:
        """Seconds to score one candidate."""
        return self.typical_seconds("rung0", self.scale * RUNG0_GUESS_S)

    def confirmation_s(self) -> float:
        """Seconds to export, score and measure one candidate that is recovered."""
        return self.typical_seconds("confirmed", self.scale * CONFIRM_GUESS_S)

    def timeout_s(self, most_s: float | None) -> float:
        """Return the seconds after which a worker ends itself: its kind's limit, or the end of the budget."""
        left = self.budget.left_s
        return min(self.scale * (left + 60.0 if most_s is None else most_s), left + TAIL_S / 2)
