"""The worker's way to the latency benchmark: measurements for the latency fit and for confirmations, kept for later studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from paretune.compression.export.graph import build_model, save_model
from paretune.compression.prune import slice_weights
from paretune.objectives.latency.measurement_key import target_key, timed_pattern
from paretune.objectives.latency.workload import Workload, workload_within
from paretune.search.evaluators.latency_measuring import LatencyMeasuring
from paretune.search.evaluators.workspace import Workspace
from paretune.spaces.candidate import Candidate, Format, Layer

LATENCY = ("decode_ms_per_token", "ttft_ms")


class Measuring(LatencyMeasuring):
    """The latency benchmark for students of a decoder."""

    latency = LATENCY

    def __init__(self, space: Workspace) -> None:
        super().__init__(space)
        self.space = space

    @property
    def turn(self) -> Workload:
        """The standard workload, or one that fits a shorter context. Raises UsageError below 8 tokens."""
        return workload_within(self.space.teacher.context)

    def build(self, candidate: Candidate, model: Path) -> None:
        """A graph with the sorted teacher's weights: values do not change the time."""
        weights, order = self.space.sorted_teacher
        shape = self.space.teacher.shape
        sliced = slice_weights(weights, candidate, order, shape)
        codes = self.space.codes(candidate, sliced)
        graph = build_model(sliced, candidate, self.space.teacher.config, shape, codes)
        save_model(graph, model)

    def fitted(self) -> None:
        """Free the sorted copy of the teacher's weights."""
        self.space.forget_sorted_teacher()

    def kept_file(self, candidate: Candidate) -> Path:
        """Return the path at which a candidate's latency is kept.

        Candidates share it if they differ only in weight values, quantizer, or a pattern without a kernel. A change of
        shape, precision, profile, engine version, thread count or machine gives another path.
        """
        profile = self.space.profile
        layers = tuple(
            Layer(
                x.ffn, x.kv_groups, _plain(x.attention_format), _plain(x.ffn_format), timed_pattern(x.pattern, profile)
            )
            for x in candidate.layers
        )
        plain = Candidate(layers, _plain(candidate.head_format), candidate.embedding_format, candidate.hidden)
        return self._folder() / f"{plain.key}.json"

    def _folder(self) -> Path:
        s = self.space.teacher.shape
        sizes = f"{s.family}-h{s.hidden}-v{s.vocab}-d{s.head_dim}x{s.heads_per_group}-{'tied' if s.tied else 'untied'}"
        return (
            self.space.cache
            / "measurements"
            / target_key(self.space.profile, self.space.fingerprint, self.turn)
            / sizes
        )


def _plain(form: Format) -> Format:
    return replace(form, algorithm="rtn")
