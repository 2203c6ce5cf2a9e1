"""The recovery of one finalist: which recipe, end to end or block by block, and whether it escalates from PTQ to QAT."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from paretune.common.errors import Infeasible
from paretune.compression.distill import LabelCache, RecoveryRecipe, recover, recover_blocks
from paretune.compression.network.student import Codes
from paretune.objectives.quality.quality import Scores, paired_difference
from paretune.search.escalation import PtqResult, QatContext, QatDecision, escalate, not_eligible, unrounded
from paretune.search.evaluators.workspace import Workspace
from paretune.search.tasks.base import Outcome
from paretune.search.tasks.recover import Recover, Recovered, RecoverResult
from paretune.spaces.candidate import Candidate
from paretune.teachers.checkpoint.training_state import save_tensors

Weights = dict[str, torch.Tensor]
Score = Callable[[Candidate, Mapping[str, torch.Tensor], Codes], Scores]


class Recovering:
    """Recovers candidates of one study; `score` gives the NLL on the search split of a candidate with its weights."""

    def __init__(self, space: Workspace, score: Score) -> None:
        self.space, self._score = space, score

    def run(self, candidate: Candidate, task: Recover) -> Outcome[RecoverResult]:
        """Distil, compare with before, keep the better weights on disk."""
        with self.space.lock.shared():
            before, masks = self.space.sparsify(candidate, self.space.dense_weights(candidate))
        recipe, choice = self._recipe(task.tokens), _Choice(self, candidate, task.context)
        deadline = time.monotonic() + task.seconds_left
        try:
            after, facts = self._train(candidate, before, masks, recipe, choice, lambda: time.monotonic() > deadline)
        except ValueError as error:  # hidden states of another width
            raise Infeasible(str(error), "") from error
        if facts["tokens"] < task.tokens - recipe.batch * recipe.context:
            return Outcome("failed", RecoverResult(details=facts), reason="the budget ended during recovery")
        scores, was = self.score(candidate, after), self.score(candidate, before)
        better = scores.mean_nll <= was.mean_nll
        file = self.space.folder / "recovered" / f"{candidate.key}.safetensors"
        kept = after if better else before
        save_tensors(file, {k: v.contiguous() for k, v in kept.items()}, {"key": candidate.key})
        chosen = choice.facts(facts["qat"], better)
        details = {
            **facts,
            "kept_recovery": better,
            "search_nll_before": was.mean_nll,
            "search_nll_after": scores.mean_nll,
            **chosen,
            **sparsity_of(masks),
        }
        recovered = Recovered(str(file), facts["tokens"], chosen["qat"], chosen["qat_reason"])
        return Outcome(result=RecoverResult(scores if better else was, details=details, recovered=recovered))

    def score(self, candidate: Candidate, weights: Weights) -> Scores:
        """As it would ship."""
        with self.space.lock.shared():
            return self._score(candidate, weights, self.space.codes(candidate, weights))

    def _recipe(self, tokens: int) -> RecoveryRecipe:
        space, chosen = self.space, self.space.spec.recovery
        return RecoveryRecipe(
            tokens,
            context=space.window,
            batch=space.batch_within_memory(RecoveryRecipe.batch),
            seed=space.spec.seed + 1,
            temperature=chosen.temperature,
            kl_weight=chosen.kl_weight,
            ce_weight=chosen.ce_weight,
            hidden_weight=chosen.hidden_weight,
        )

    def _train(
        self,
        candidate: Candidate,
        before: Weights,
        masks: Weights,
        recipe: RecoveryRecipe,
        choice: _Choice,
        stop: Callable[[], bool],
    ) -> tuple[Weights, dict[str, Any]]:
        space = self.space
        kept = space.kept_layers(candidate)
        basics = (space.teacher_weights, before, masks, candidate, space.network, space.teacher.shape.layers)
        text = (space.tokens["train"].ids, recipe, space.lock.shared, stop)
        if space.space.mild and candidate.width(space.teacher.shape) == space.teacher.shape.hidden:
            after, facts = recover_blocks(*basics, *text, kept=kept, decide=choice)
            return after, {**facts, "method": "block by block"}
        cache = self._labels(recipe)
        after, facts = recover(*basics, *text, kept=kept, cache=cache, decide=choice)
        cached = {} if cache is None else {"labels_kept": cache.hits, "labels_computed": cache.misses}
        return after, {**facts, **cached, "method": "end to end"}

    def _labels(self, recipe: RecoveryRecipe) -> LabelCache | None:
        """Where the teacher's labels are kept; batches of another text, order or length have other contents."""
        k = self.space.spec.recovery.cached_labels
        if k == 0 or recipe.hidden_weight:
            return None
        order = repr((recipe.context, recipe.batch, recipe.seed))
        content = (self.space.teacher.digest, self.space.corpus_fingerprint, order)
        return LabelCache(self.space.cache / "labels", content, k, recipe.temperature)


def sparsity_of(masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Fraction of the masked matrices' entries that are zero, and whether that is none at all; empty without masks."""
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    return {"sparsity": 1 - kept / total, **({"idle_masks": 1.0} if kept == total else {})} if total else {}


class _Choice:
    """PTQ is tried when training asks; remembers what was found and decided."""

    def __init__(self, recovering: Recovering, candidate: Candidate, context: QatContext | None) -> None:
        self.recovering, self.candidate = recovering, candidate
        self.context = context
        self.made: QatDecision = not_eligible(candidate)
        self.tried: PtqResult | None = None

    def __call__(self, weights: Weights) -> bool:
        rounded = self.recovering.score(self.candidate, weights)
        exact = self.recovering.score(unrounded(self.candidate), weights)
        low = paired_difference(rounded, exact)[1]
        self.tried = PtqResult(rounded.mean_nll, exact.mean_nll, low)
        self.made = (
            QatDecision(True, "its layers have fewer than 8 bits")
            if self.context is None
            else escalate(self.tried, self.context)
        )
        return self.made.qat

    def facts(self, trained: float, kept: bool) -> dict[str, Any]:
        """For the record: whether the weights that ship were trained under the rounding, and why (not)."""
        reason = self.made.reason + (
            "; training made nothing better, so the weights are those from before" if not kept else ""
        )
        found = (
            {} if self.tried is None else {"ptq_nll": self.tried.ptq_nll, "unquantized_nll": self.tried.unquantized_nll}
        )
        return {"qat": bool(trained) and kept, "qat_reason": reason, **found}
