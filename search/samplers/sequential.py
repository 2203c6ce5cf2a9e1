"""The recipe that joint search has to beat: one axis after the other. Per student size the best mask, then every precision.

Sizes come from a list that is spread over the predicted latency, largest first, then by halves, so that a search which ends
early has covered the range. Masks of a size are compared at one precision (int8); the best is the one whose point dominates
the greatest volume below the spec's reference point, which trades loss for bytes without a weight of our own. A size that
loses more than `loss_of_interest` while it is still dense is left at that. Later rounds go on with more sizes, ratios and
precisions. What has been decided is kept in the store, so a resumed search goes on with the plan that it had.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from paretune.objectives.directions import minimized
from paretune.search.estimation.estimates import Estimates
from paretune.search.front import Vector
from paretune.search.hypervolume import in_teacher_units, volume
from paretune.spaces.candidate import Candidate, Shape
from paretune.spaces.space import Distribution, Space

SIZE, MASK = ("depth", "ffn", "kv_groups", "hidden"), ("pattern", "ratio", "score")
MIXED = ("precision_mode", "effective_bits")
ALIKE = 0.04
Params = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """How fine a round is: number of sizes, all ratios or the middle one, which precision variables move."""

    sizes: int
    all_ratios: bool
    precisions: str


ROUNDS = (Round(8, False, "tied"), Round(16, True, "bits"), Round(32, True, "all"))


class SequentialPlan:
    """Proposes candidates. What `ask` answers depends on nothing but the store."""

    def __init__(self, estimates: Estimates) -> None:
        self.estimates, self.ledger = estimates, estimates.ledger
        assert isinstance(estimates.space, Space)  # checked when the search is prepared
        self.space, self.spec = estimates.space, estimates.spec
        self.variables = self.space.distributions()
        self._size = [name for name in SIZE if name in self.variables]
        self._fixed = self._fixed_precision()
        self._plan = self._walk()

    def ask(self) -> Params | None:
        """Parameters of the next candidate that the store does not know yet, None when the plan is done."""
        unknown = (p for p in self._plan if self.space.decode(p).key not in self.ledger.rows)
        return next(unknown, None)

    def _walk(self) -> Iterator[Params]:
        for number, step in enumerate(ROUNDS):
            for size in self._sizes()[: step.sizes]:
                yield from self._of_size(size, step, number)

    def _of_size(self, size: Params, step: Round, number: int) -> Iterator[Params]:
        """The masks of a size, dense first; when all have been explored, every precision under the best of them."""
        dense, *masked = (size | mask | self._fixed for mask in self._masks(step.all_ratios))
        yield dense
        if self._is_hopeless(dense, f"{number}"):
            return
        yield from masked
        best = self._best_mask(size, [dense, *masked], f"{number}")
        for precision in self._precisions(step.precisions):
            yield best | precision

    # sizes

    def _sizes(self) -> list[Params]:
        """The list of sizes, made once per study from the latency fit as it then is."""
        kept = self._kept("sizes", "list")
        if kept is None:
            kept = self._spread(max(step.sizes for step in ROUNDS))
            self._keep("sizes", "list", kept)
        found: list[Params] = kept
        return found

    def _spread(self, count: int) -> list[Params]:
        """Sizes at latency levels 1, 1/2, 1/4, 3/4, 1/8 … of the range; of those about as fast the one with most parameters."""
        sizes = [
            dict(zip(self._size, choice, strict=True)) for choice in itertools.product(*map(self._choices, self._size))
        ]
        dense = [self.space.decode(size | self._masks(False)[0] | self._fixed) for size in sizes]
        latency, weight = [self._latency(c) for c in dense], [_weights(c, self.space.shape) for c in dense]
        low, high = min(latency), max(latency)
        found: list[int] = []
        for level in [1.0, *(_halves(i) for i in range(1, min(count, len(sizes))))]:
            left, wanted = set(range(len(sizes))) - set(found), low + level * (high - low)
            near = min(abs(latency[i] - wanted) for i in left)
            alike = [i for i in sorted(left) if abs(latency[i] - wanted) <= max(near, ALIKE * wanted)]
            found.append(max(alike, key=lambda i: (weight[i], -latency[i])))
        return [sizes[i] for i in found]

    def _latency(self, candidate: Candidate) -> float:
        predicted = self.estimates.predictions(candidate)
        wanted = [name for name in self.spec.objectives if name in predicted]
        name = wanted[0] if wanted else "decode_ms_per_token"
        return minimized(name, predicted[name].value)

    # masks

    def _masks(self, all_ratios: bool) -> list[Params]:
        """Dense, then every pattern with every score, at the middle ratio or at all."""
        ratios, (dense, *patterns) = self._choices("ratio"), self._choices("pattern")
        scores = self._choices("score")
        middle = ratios[len(ratios) // 2]
        chosen = sorted(ratios, key=lambda r: abs(r - middle)) if all_ratios else [middle]
        masks = itertools.product(chosen, patterns, scores)
        found = [{"pattern": p, "ratio": r, "score": s} for r, p, s in masks]
        return [{"pattern": dense, "ratio": 0, "score": scores[0]}, *found]

    def _is_hopeless(self, dense: Params, number: str) -> bool:
        """Whether the dense student of a size loses more than is of interest; decided once it has been explored."""
        key = self.space.decode(dense).key
        known = self._kept("hopeless", number + key)
        if known is None and self.estimates.vector(key) is not None:
            known = self.estimates.constraints(key)["loss"] > 0
            self._keep("hopeless", number + key, known)
        return bool(known)

    def _best_mask(self, size: Params, masks: list[Params], number: str) -> Params:
        """Size and mask whose explored point dominates the greatest volume; decided when the first precision is wanted."""
        name = number + "-".join(str(size[v]) for v in self._size)
        known: Params | None = self._kept("masks", name)
        if known is None:
            known = max(masks, key=self._volume)  # the first, dense, if none was explored
            self._keep("masks", name, known)
        return known

    def _volume(self, params: Params) -> float:
        """Of one point. The dense full size is a baseline, which has no rung-0 estimate but a confirmation."""
        key, objectives = self.space.decode(params).key, self.spec.objectives
        found = self.estimates.vector(key) or self._confirmed(key)
        teacher = self._confirmed(self.space.baselines()[0].key)
        if found is None or teacher is None:
            return -math.inf
        return volume([in_teacher_units(found, teacher, objectives)], self.spec.reference, objectives)

    def _confirmed(self, key: str) -> Vector | None:
        e = self.ledger.latest.get((key, "confirmed"))
        return None if e is None or e.status != "complete" else self.estimates.confirmed_vector(e)

    # precisions

    def _fixed_precision(self) -> Params:
        """int8 everywhere, or the finest precision of a profile without it."""
        first = {name: self._choices(name)[0] for name in self.variables}
        bits = [name for name in self._precision_names() if name.endswith("_bits")]

        def with_bits(index: int) -> Params:
            return first | dict.fromkeys(bits, index)

        found = {i: self.space.decode(with_bits(i)).layers[0].ffn_format.name for i in self._choices(bits[0])}
        index = next((i for i, name in found.items() if name == "int8"), max(found))
        return {name: value for name, value in with_bits(index).items() if name in self._precision_names()}

    def _precisions(self, which: str) -> Iterator[Params]:
        """ "tied": all layers alike, head and embedding alike; "bits": mixed ones, then every combination of bits;
        "all": of everything."""
        fixed, bits = self._fixed, [n for n in self._precision_names() if n.endswith("_bits")]
        if which == "tied":
            layers = [n for n in bits if n in ("attention_bits", "ffn_bits")]
            rest = [n for n in bits if n not in layers]
            for a, b in itertools.product(self._choices(layers[0]), self._choices(rest[0])):
                yield fixed | dict.fromkeys(layers, a) | dict.fromkeys(rest, b)
            return
        for level in self._choices("effective_bits") if "effective_bits" in self.variables else ():
            yield fixed | {"precision_mode": "mixed", "effective_bits": level}
        names = bits if which == "bits" else self._precision_names()
        for choice in itertools.product(*map(self._choices, names)):
            yield fixed | dict(zip(names, choice, strict=True))

    def _precision_names(self) -> list[str]:
        """All variables that are neither of the size nor of the mask."""
        return [name for name in self.variables if name not in (*SIZE, *MASK, *MIXED)]

    def _choices(self, name: str) -> list[Any]:
        return choices(self.variables[name])

    # decisions, in the store

    def _kept(self, kind: str, name: str) -> Any:
        return self.ledger.store.meta("sequential", {}).get(kind, {}).get(name)

    def _keep(self, kind: str, name: str, value: Any) -> None:
        plan = self.ledger.store.meta("sequential", {})
        plan.setdefault(kind, {})[name] = value
        self.ledger.store.set_meta(sequential=plan)


def choices(variable: Distribution) -> list[Any]:
    """All values of a sampler variable, in their order."""
    kind, bounds = variable
    return list(range(bounds[0], bounds[1] + 1)) if kind == "int" else list(bounds)


def _weights(candidate: Candidate, shape: Shape) -> int:
    """Weights in the layers: how much of the teacher a size keeps."""
    group = 2 * shape.head_dim * (shape.heads_per_group + 1)
    rows = sum(shape.ffn_matrices * layer.ffn + group * layer.kv_groups for layer in candidate.layers)
    return candidate.width(shape) * rows


def _halves(i: int) -> float:
    """The i-th number of 1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8 … (van der Corput, base 2)."""
    value, part = 0.0, 0.5
    while i:
        value, i, part = value + part * (i & 1), i >> 1, part / 2
    return value
