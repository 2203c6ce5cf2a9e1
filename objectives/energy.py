"""Throughput, energy and cost: what follows from the time of a decode step, and from a target's power and price.

Energy as power times time is a ceiling (the profile's figure is what the device may draw, not what decoding draws), so it
is always `predicted`; where a counter can be read, the latency benchmark measures it instead (power.py). Cost is rent for the time of
one stream: a server that batches serves more of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paretune.objectives.measurement import Measurement, Provenance

if TYPE_CHECKING:
    from paretune.hardware_profiles.profile import Profile

ENERGY, COST, THROUGHPUT = "energy_j_per_token", "usd_per_million_tokens", "throughput_tokens_per_s"
# What a profile must say for a quantity, and the words for it.
NEEDED = {ENERGY: "power_watts", COST: "price_usd_per_hour"}


def throughput(decode: Measurement, batch: int = 1) -> Measurement:
    """Return the tokens per second of `batch` streams that decode together; `decode` is the milliseconds of one step.

    The interval is that of the time, inverted; its lower end counts as a hundredth of the value at least.
    """
    shortest = max(decode.low, decode.value / 100)
    value, low, high = (1e3 * batch / ms for ms in (decode.value, decode.high, shortest))
    note = f"{batch} / the time of a step, from the same visits"
    return Measurement(value, "tokens/s", low, high, decode.provenance, decode.samples, decode.fingerprint, note)


def energy_and_cost(decode: Measurement, profile: Profile, devices: int = 1) -> dict[str, Measurement]:
    """Joules per token and US dollars per million tokens of one stream (batch 1), as far as the profile has power and price.

    `decode`: milliseconds per token on that profile. `devices` of them work on it, each with its power and price
    (the latency benchmark runs on one). Energy is
    `predicted` even from a measured time; cost is as sure as the time. Of a disturbed time both are disturbed.
    """
    found = {}
    seconds = 1e-3
    if profile.power_watts is not None:
        watts = profile.power_watts * devices
        provenance: Provenance = "disturbed" if decode.provenance == "disturbed" else "predicted"
        note = f"{watts:g} W of the profile times the time of a token; the interval is that of the time"
        found[ENERGY] = _scaled(decode, watts * seconds, "J/token", provenance, note)
    if profile.price_usd_per_hour is not None:
        price = profile.price_usd_per_hour * devices
        note = f"{price:g} USD/h of the profile times the time of a token, one stream"
        found[COST] = _scaled(decode, price / 3600 * seconds * 1e6, "USD/million tokens", decode.provenance, note)
    return found


def following(decode: Measurement, profile: Profile) -> dict[str, Measurement]:
    """Everything that follows from a decode step: throughput, energy and cost."""
    return {THROUGHPUT: throughput(decode), **energy_and_cost(decode, profile)}


def _scaled(decode: Measurement, factor: float, unit: str, provenance: Provenance, note: str) -> Measurement:
    low, value, high = (factor * ms for ms in (decode.low, decode.value, decode.high))
    return Measurement(value, unit, low, high, provenance, decode.samples, decode.fingerprint, note)
