"""Tensor parallelism as a cost: how many devices a decoder needs, and what their all-reduces take."""

from __future__ import annotations

from collections.abc import Callable

from paretune.hardware_profiles.errors import Infeasible
from paretune.hardware_profiles.profile import Profile
from paretune.spaces.candidate import Shape


def tensor_parallel_degree(needed_bytes: Callable[[int], float], profile: Profile, shape: Shape) -> int:
    """The smallest number of devices, a divisor of the KV heads, on each of which `needed_bytes(degree)` fit.

    Raises Infeasible with the numbers if none of the profile's devices' counts suffices.
    """
    degrees = [d for d in range(1, profile.devices + 1) if shape.kv_heads % d == 0]
    for degree in degrees:
        if needed_bytes(degree) <= profile.memory_bytes:
            return degree
    least = min(needed_bytes(d) for d in degrees)
    raise Infeasible(
        f"{profile.name} has {profile.memory_bytes / 1e9:.3g} GB on each of {profile.devices} device(s), but at least "
        f"{least / 1e9:.3g} GB are needed with {shape.kv_heads} KV heads",
        "fewer bits, a smaller student, a smaller batch or a shorter context",
    )


def all_reduce_ms(message_bytes: float, degree: int, profile: Profile) -> float:
    """Milliseconds of one ring all-reduce: 2(p-1) messages of a p-th each; 0 on one device."""
    if degree == 1:
        return 0.0
    assert profile.link_alpha_us is not None and profile.link_gb_per_s is not None
    rounds = 2 * (degree - 1)
    return rounds * profile.link_alpha_us / 1e3 + rounds / degree * message_bytes / (profile.link_gb_per_s * 1e6)
