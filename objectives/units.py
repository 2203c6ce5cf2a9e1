"""Units of what paretune measures itself, by exact name; of everything else the measurement says its own unit.

A name never tells a unit: a plug-in may call its quality `rms_error` or `wasted_bytes`, and count it in millimetres.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from paretune.objectives.energy import COST, ENERGY, THROUGHPUT

BYTES: Final = frozenset({"bytes", "compressed_bytes", "peak_memory_bytes"})
MILLISECONDS: Final = frozenset(
    {"decode_ms_per_token", "decode_p90_ms", "ttft_ms", "forward_ms", "forward_p90_ms", "load_ms"}
)
RATES: Final[Mapping[str, str]] = {THROUGHPUT: "tokens/s", ENERGY: "J/token", COST: "USD per million tokens"}
# Told without a unit, three digits after the point.
PLAIN: Final = frozenset({"nll", "estimated_nll", "perplexity", "bits_per_byte", "kl", "top1_agreement"})
MEGA: Final = 1e6


def drawn_in(name: str) -> float:
    """What a measurement is divided by where it is drawn or told: bytes are told in MB."""
    return MEGA if name in BYTES else 1.0


def plain(name: str, value: float, unit: str = "", signed: bool = False, digits: int = 3) -> str:
    """A value as people read it, with its unit: of our own measurements the usual one, of a plug-in's `unit`. `digits` are the
    significant ones of rates; `signed` is for a loss."""
    if name in RATES:
        return f"{value:.{digits}g} {RATES[name]}"
    if name in BYTES:
        return f"{value / MEGA:.2f} MB"
    if name == "relative_loss":
        return f"{value:{'+' if signed else ''}.1%}"
    if name in MILLISECONDS:
        return f"{value:.3f} ms"
    if name in PLAIN:
        return f"{value:.3f}"
    return f"{value:.4g}" + (f" {unit}" if unit not in ("", "1") else "")
