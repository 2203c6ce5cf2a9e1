"""Quality on text: NLL and what follows from it, paired against the teacher, with intervals clustered by document.

Tokens of one document are not independent, so intervals resample documents, not tokens (cluster bootstrap, Cameron,
Gelbach & Miller 2008); differences are taken per document first, because candidate and teacher read the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from paretune.objectives.measurement import Measurement

RESAMPLES = 2000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Sums per document: `nll` in nats over `targets` tokens; `kl` and `agree` over `reference_targets` of them."""

    documents: tuple[str, ...]
    nll: tuple[float, ...]
    targets: tuple[int, ...]
    kl: tuple[float, ...] = ()
    agree: tuple[float, ...] = ()
    reference_targets: tuple[int, ...] = ()

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return sum(self.nll) / sum(self.targets)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """Return the scores of a parsed JSON object, whose lists become tuples."""
        return cls(**{key: tuple(value) for key, value in data.items()})


def sum_by_document(values: npt.NDArray[Any], cluster: npt.NDArray[np.int64], documents: int) -> tuple[float, ...]:
    """Sums of `values` per document index in `cluster`, for `documents` documents."""
    return tuple(float(v) for v in np.bincount(cluster[: len(values)], weights=values, minlength=documents))


def paired_difference(mine: Scores, other: Scores) -> tuple[float, float, float]:
    """Mean NLL of `mine` minus `other` in nats/token, with its 95 % cluster-bootstrap interval: (value, low, high)."""
    if mine.documents != other.documents or mine.targets != other.targets:
        raise ValueError("a paired difference needs scores over the same documents and tokens")
    difference = np.array(mine.nll) - np.array(other.nll)
    return interval_of_ratio(difference, np.array(mine.targets, np.float64))


def quality_measurements(
    scores: Scores, teacher: Scores, bytes_per_token: float, fingerprint: str
) -> dict[str, Measurement]:
    """nll, nll_increase and relative_loss against the teacher, perplexity, bits_per_byte, and where scored kl and top1_agreement."""
    targets = np.array(scores.targets, np.float64)
    n, documents = int(targets.sum()), sum(1 for t in scores.targets if t)

    def made(triple: tuple[float, float, float], unit: str, samples: int = n, over: int = documents) -> Measurement:
        note = f"95 % interval over {over} documents"
        return Measurement(triple[0], unit, triple[1], triple[2], "measured", samples, fingerprint, note)

    nll = interval_of_ratio(np.array(scores.nll), targets)
    increase = paired_difference(scores, teacher)
    per_byte = 1 / (math.log(2) * bytes_per_token)
    found = {
        "nll": made(nll, "nats/token"),
        "nll_increase": made(increase, "nats/token"),
        "relative_loss": made(
            _each(increase, partial(relative, base=teacher.mean_nll)), "fraction of the teacher's NLL"
        ),
        "perplexity": made(_each(nll, perplexity), "1"),
        "bits_per_byte": made(_each(nll, lambda v: v * per_byte), "bits/byte"),
    }
    if scores.kl:
        weights = np.array(scores.reference_targets, np.float64)
        samples = int(weights.sum())
        found["kl"] = made(interval_of_ratio(np.array(scores.kl), weights), "nats/token", samples)
        found["top1_agreement"] = made(
            interval_of_ratio(np.array(scores.agree), weights), "fraction of tokens", samples
        )
    return found


def relative(increase: float, base: float) -> float:
    """An increase as a fraction of what it started from; the increase itself where that was 0, as the loss of constant text can be."""
    return increase / (abs(base) or 1.0)


def perplexity(nll: float) -> float:
    """exp of nats per token; infinite beyond what a float holds (709 nats)."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _each(triple: tuple[float, float, float], of: Callable[[float], float]) -> tuple[float, float, float]:
    return of(triple[0]), of(triple[1]), of(triple[2])


def interval_of_ratio(sums: Array, weights: Array) -> tuple[float, float, float]:
    """sum(sums) / sum(weights) and its 95 % interval from resampled documents; the interval is the point if there is one document."""
    used = weights > 0
    sums, weights = sums[used], weights[used]
    value = float(sums.sum() / weights.sum())
    if len(sums) < 2:
        return value, value, value
    picks = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.quantile(sums[picks].sum(1) / weights[picks].sum(1), [0.025, 0.975])
    return value, float(low), float(high)
