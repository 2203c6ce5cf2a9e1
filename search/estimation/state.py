"""Everything a search knows while it runs, read from the study: what the kinds of tasks and the planning work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from paretune.search.budget import Budget
from paretune.search.estimation.costs import Costs
from paretune.search.estimation.estimates import Estimates
from paretune.search.estimation.ledger import Ledger
from paretune.search.spec import Spec
from paretune.search.study.store import Store
from paretune.spaces.kinds import AnySpace
from paretune.spaces.mixed import Sensitivity
from paretune.spaces.space import Space

Notify = Callable[[str, dict[str, Any]], None]


def silent(_kind: str, _data: dict[str, Any]) -> None:
    """Tell nobody."""


class SearchState:
    """The study's store with what is derived from it, and whether the search has to end.

    `workers` tasks can be done at once, each on `threads` threads (None: unknown). The search space belongs to `estimates`; it
    grows once the sensitivity table is known.
    """

    def __init__(
        self,
        store: Store,
        spec: Spec,
        space: AnySpace,
        budget: Budget,
        notify: Notify = silent,
        workers: int = 1,
        threads: int | None = None,
    ) -> None:
        self.store, self.spec, self.budget, self.notify, self.workers = store, spec, budget, notify, workers
        self.ledger = Ledger(store)
        self.estimates = Estimates(store, spec, space, self.ledger)
        self.costs = Costs(store, spec, space.shape, budget, self.ledger, workers, threads)
        self.stop_reason: str | None = None
        self.exit_code = 0
        self.remedy = ""
        self.open_mixed()

    @property
    def space(self) -> AnySpace:
        """The search space as it is now."""
        return self.estimates.space

    @property
    def teacher_key(self) -> str:
        """Key of the fp32 teacher, the first baseline."""
        return self.estimates.teacher_key

    @property
    def teacher_is_confirmed(self) -> bool:
        """Whether candidates can be compared with the teacher."""
        e = self.ledger.latest.get((self.teacher_key, "confirmed"))
        return e is not None and e.status == "complete"

    @property
    def has_fit(self) -> bool:
        """Whether the latency fit is measured."""
        return self.store.meta("fit_done") is True

    @property
    def has_elastic(self) -> bool:
        """Whether the elastic student is trained (for a plug-in: whether its training speed is known)."""
        return self.store.meta("elastic", {}).get("done") is True

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the space has mixed precision whose sensitivity table is not measured yet."""
        space = self.space
        return isinstance(space, Space) and space.has_mixed and space.sensitivity is None

    def give_up(self, reason: str, exit_code: int, remedy: str = "") -> None:
        """End the search with this exit code; nothing new is handed out."""
        self.stop_reason, self.exit_code, self.remedy = reason, exit_code, remedy
        self.store.event("stopped", f"{reason}; {remedy}" if remedy else reason)

    def require_teacher(self, key: str, reason: str) -> None:
        """End the search if `key` is the fp32 teacher and it cannot be confirmed: without it nothing can be judged."""
        if key == self.teacher_key and self.stop_reason is None:
            e = self.ledger.latest[key, "confirmed"]
            if e.status in ("failed", "infeasible"):
                self.give_up(f"the teacher itself could not be confirmed: {reason}", 4)

    def open_mixed(self) -> None:
        """Add mixed precision to the space if the study has a sensitivity table; take it away if that cannot be measured."""
        known, space = self.store.meta("sensitivity"), self.space
        if known is not None and isinstance(space, Space) and space.has_mixed:
            table = None if known["table"] is None else Sensitivity.from_dict(known["table"])
            self.estimates.space = replace(space, mixed=table is not None, sensitivity=table)
            self.estimates.version += 1
