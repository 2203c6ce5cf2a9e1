"""What a study's numbers are called: the quality it minimizes, and the times that its latency benchmark takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from paretune.objectives.measurement import Measurement

# Milliseconds of one forward of a plug-in's module at the plug-in's batch shape.
FORWARD = "forward_ms"
RENAMED = {"decode_ms_per_token": FORWARD, "decode_p90_ms": "forward_p90_ms"}
LEFT_OUT = ("ttft_ms", "throughput_tokens_per_s", "energy_j_per_token")


@dataclass(frozen=True)
class MetricNames:
    """Names, units and labels of one study; the defaults are those of decoders.

    `latencies` are (name, unit) pairs, the first of which is the objective; `others` are further qualities, told but not
    minimized. `labels` are for people and cover what is not a decoder's.
    """

    quality: str = "nll"
    quality_unit: str = "nats/token"
    latencies: tuple[tuple[str, str], ...] = (("decode_ms_per_token", "ms/token"), ("ttft_ms", "ms"))
    others: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def is_decoder(self) -> bool:
        """Whether these are the names of a decoder, not of a plug-in's module."""
        return self.latencies[0][0] != FORWARD

    @property
    def estimate(self) -> str:
        """The name of the calibrated estimate at rung 0."""
        return f"estimated_{self.quality}"

    @property
    def increase(self) -> str:
        """The name of the paired difference to the teacher."""
        return f"{self.quality}_increase"

    @property
    def latency(self) -> str:
        """Name of the latency that is an objective."""
        return self.latencies[0][0]

    def objectives(self) -> tuple[str, ...]:
        """What is searched for by default."""
        return self.quality, self.latency, "compressed_bytes"

    def to_dict(self) -> dict[str, Any]:
        """Return the names as a study's meta keeps them; `of` reads them back."""
        return asdict(self)

    @classmethod
    def of(cls, meta: Mapping[str, Any] | None) -> MetricNames:
        """From a study's meta; studies without it are of decoders."""
        if not meta:
            return cls()
        return cls(
            meta["quality"],
            meta["quality_unit"],
            tuple((name, unit) for name, unit in meta["latencies"]),
            tuple(meta["others"]),
            tuple((name, label) for name, label in meta["labels"]),
        )


DECODER = MetricNames()


def forward_measurements(measurements: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """The latency benchmark's measurements of a module under the module's names: a decode step was one forward."""
    return {
        RENAMED.get(name, name): replace(m, unit="ms") if name in RENAMED else m
        for name, m in measurements.items()
        if name not in LEFT_OUT
    }
