"""Who was proposed and what came of it: the store's candidates and evaluations, kept in memory for the search's decisions."""

from __future__ import annotations

import dataclasses
from typing import Any

from paretune.search.study.records import CandidateRow, Evaluation, Fidelity
from paretune.search.study.store import Store
from paretune.spaces.kinds import AnyCandidate

MAX_ATTEMPTS = 3


class Ledger:
    """`rows` by candidate key in the order of their proposal; `latest` evaluation by (key, fidelity)."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rows: dict[str, CandidateRow] = {row.key: row for row in store.candidates()}
        self.latest: dict[tuple[str, Fidelity], Evaluation] = {}
        for e in store.evaluations():
            self._keep(e)

    def add(self, candidate: AnyCandidate, source: str, params: dict[str, Any], **meta: Any) -> bool:
        """Record a proposal in the store; False if it is known."""
        if candidate.key in self.rows or not self.store.add_candidate(candidate, source, params, **meta):
            return False
        self.rows[candidate.key] = CandidateRow(candidate.key, len(self.rows), source, candidate, params)
        return True

    def refresh(self, key: str, fidelity: Fidelity) -> None:
        """Read an evaluation again after the store was told of it."""
        self._keep([e for e in self.store.evaluations_of(key) if e.fidelity == fidelity][-1])

    def complete(self, fidelity: Fidelity) -> list[Evaluation]:
        """The complete evaluations at a fidelity."""
        return [e for (_, f), e in self.latest.items() if f == fidelity and e.status == "complete"]

    def is_open(self, key: str, fidelity: Fidelity) -> bool:
        """Whether a candidate still wants this evaluation: never tried, or lost with attempts left."""
        e = self.latest.get((key, fidelity))
        return e is None or (e.status == "lost" and e.attempt < MAX_ATTEMPTS)

    def explored_keys(self) -> list[str]:
        """Keys with a complete rung-0 evaluation in the order of their proposal."""
        return [
            key for key in self.rows if (e := self.latest.get((key, "rung0"))) is not None and e.status == "complete"
        ]

    def _keep(self, e: Evaluation) -> None:
        """Remember an evaluation, but never in place of a complete one by an attempt to repeat it that failed."""
        known = self.latest.get((e.key, e.fidelity))
        if known is not None and known.status == "complete" and e.status != "complete":
            e = dataclasses.replace(known, attempt=e.attempt)
        self.latest[e.key, e.fidelity] = e
