"""The worker's way to the lane: measurements for the latency fit and for confirmations, kept for later studies."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretune.compression.export.graph import build_model, save_model
from paretune.compression.prune import slice_weights
from paretune.hardware_profiles.files import read_kept, warn_damaged, write_atomically
from paretune.objectives.lane import Lane, LaneResult, Pair
from paretune.search.reference import open_lane
from paretune.search.work import Outcome, Work
from paretune.search.workspace import Workspace
from paretune.spaces.candidate import Candidate, Format, Layer

SLICE_S = 10.0
ENOUGH_QUIET = 10
LATENCY = ("decode_ms_per_token", "ttft_ms")


class Measuring:
    """One lane per worker; every undisturbed latency is kept under what it depends on."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self._lane: Lane | None = None
        self._missing: list[Candidate] | None = None
        self._rough: list[dict[str, Any]] = []
        self._deadline = 0.0

    def lane(self) -> Lane:
        if self._lane is None:
            self._lane = open_lane(self.space.cache, self.space.profile, self.space.lock)
        return self._lane

    def close(self) -> None:
        """Nothing is held between visits."""

    def measure(self, candidate: Candidate, model: Path, pair: Pair | None = None) -> LaneResult:
        """Several visits with fresh processes, or one with the children of `pair`."""
        result = self.lane().measure(model) if pair is None else self.lane().quick(model, pair)
        if result.stable:
            found = {name: result.measurements[name].to_dict() for name in LATENCY}
            kept = {"candidate": json.loads(candidate.to_json()), **found}
            write_atomically(self.kept_file(candidate), json.dumps(kept).encode())
        return result

    def fit(self, work: Work) -> Outcome:
        """Measure designed candidates that no kept measurement covers, a slice of time per call, `seconds` in all.

        On a machine that is too busy the disturbed values serve the fit (and nothing else), which the outcome says.
        """
        if self._missing is None:
            designed = [Candidate.from_dict(d) for d in work.options["design"]]
            self._missing = [c for c in designed if _kept(self.kept_file(c)) is None]
            self._rough, self._deadline = [], time.monotonic() + min(work.options["seconds"], work.seconds_left)
        start = time.monotonic()
        if self._missing:
            with self.lane().pair() as pair:
                while self._missing and time.monotonic() < min(start + SLICE_S, self._deadline):
                    self._measure_random(self._missing.pop(0), pair)
        if self._missing and time.monotonic() < self._deadline:
            return Outcome(done=False, facts={"missing": len(self._missing)})
        self.space.forget_sorted_teacher()
        kept = self.all_kept()
        disturbed = self._rough if len(kept) < ENOUGH_QUIET else []
        skipped, self._missing = len(self._missing), None
        return Outcome(facts={"kept": kept + disturbed, "missing": skipped, "disturbed": len(disturbed)})

    def _measure_random(self, candidate: Candidate, pair: Pair) -> None:
        """Measure a candidate with the sorted teacher's weights: values do not change the time."""
        weights, order = self.space.sorted_teacher
        shape = self.space.teacher.shape
        model = self.space.folder / "work" / "fit.onnx"
        model.parent.mkdir(parents=True, exist_ok=True)
        graph = build_model(
            slice_weights(weights, candidate, order, shape), candidate, self.space.teacher.config, shape
        )
        save_model(graph, model)
        result = self.measure(candidate, model, pair)
        if not result.stable:
            found = {name: result.measurements[name].value for name in LATENCY}
            self._rough.append({"candidate": json.loads(candidate.to_json()), **found})

    def kept_file(self, candidate: Candidate) -> Path:
        """Where a candidate's latency is kept: a changed weight value, pattern or quantizer hits, a changed shape, engine version,
        thread count or machine misses."""
        layers = tuple(
            Layer(x.ffn, x.kv_groups, _plain(x.attention_format), _plain(x.ffn_format)) for x in candidate.layers
        )
        plain = Candidate(layers, _plain(candidate.head_format), candidate.embedding_format, candidate.hidden)
        return self._folder() / f"{plain.key}.json"

    def all_kept(self) -> list[dict[str, Any]]:
        """Everything kept for this teacher's shape on this machine: {"candidate", "decode_ms_per_token", "ttft_ms"}."""
        found = (_kept(path) for path in sorted(self._folder().glob("*.json")))
        return [kept for kept in found if kept is not None]

    def _folder(self) -> Path:
        s, p = self.space.teacher.shape, self.space.profile
        engine = f"{self.space.fingerprint}-{p.engine}-{p.engine_version}-t{p.threads}"
        sizes = f"{s.family}-h{s.hidden}-v{s.vocab}-d{s.head_dim}x{s.heads_per_group}-{'tied' if s.tied else 'untied'}"
        return self.space.cache / "measurements" / engine / sizes


def _plain(form: Format) -> Format:
    return replace(form, algorithm="rtn")


def _kept(path: Path) -> dict[str, Any] | None:
    """A kept measurement: {"candidate", "decode_ms_per_token", "ttft_ms"}; None if it is not there or damaged."""
    found = read_kept(path)
    try:
        if found is None:
            return None
        Candidate.from_dict(found["candidate"])
        return {"candidate": found["candidate"], **{name: float(found[name]["value"]) for name in LATENCY}}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        warn_damaged(path, error)
        return None
