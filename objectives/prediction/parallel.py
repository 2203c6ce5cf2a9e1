"""What it costs to divide a model among devices: tensor parallelism, and pipeline stages as the alternative.

Tensor parallelism is Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053, section 3): every device has a part of the heads,
of the FFN's neurons and of the vocabulary, and a layer ends twice in a sum over all devices, after the attention's output
product and after the FFN's. Each sum is an all-reduce of hidden x batch x tokens numbers. A ring takes

    2 (p - 1) alpha + 2 (p - 1) / p x bytes / bandwidth

for it (Patarasuk and Yuan 2009; alpha: one message's latency). At batch 1 a decode step's messages are some kilobytes, so alpha decides.

KV heads are divided, never repeated on several devices, so the degree divides their number; and what a device has of the
inner width K of the two output products must be whole quantization groups and whole sparsity blocks.

A pipeline (model parallelism by layers, GPipe, arXiv 1811.06965) sends one message per boundary, but one sequence passes the
stages one after the other: it divides memory, and a decode step at batch 1 is no faster than on one device.

All of it is arithmetic on a profile's figures: provenance "predicted", never "measured".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from paretune.common.errors import Infeasible, UsageError
from paretune.objectives.measurement import Measurement
from paretune.spaces.candidate import BLOCK, ENGINE_BLOCKS, PER_CHANNEL, Candidate, Format, Pattern, Shape, group_for

REDUCES_PER_LAYER = 2


class Devices(Protocol):
    """What is read of a profile: equal devices, `memory_bytes` each, and the link between any two of them."""

    @property
    def name(self) -> str:
        """The profile's name."""

    @property
    def memory_bytes(self) -> int:
        """Memory of one device, in bytes."""

    @property
    def devices(self) -> int:
        """Number of devices, at least 1."""

    @property
    def link_alpha_us(self) -> float | None:
        """Latency of one message between two devices, in microseconds; None if it is unknown."""

    @property
    def link_gb_per_s(self) -> float | None:
        """Bandwidth between two devices, in 10^9 bytes per second; None if it is unknown."""


def all_reduce_ms(message_bytes: float, degree: int, profile: Devices) -> float:
    """Milliseconds of one ring all-reduce of `message_bytes` (per device) over `degree` devices; 0 for one device.

    Raises ValueError for an impossible message or degree, UsageError where the profile does not know its links.
    """
    if degree < 1 or not 0 <= message_bytes < math.inf:
        raise ValueError(f"an all-reduce needs degree >= 1 and 0 <= bytes < inf, but got {degree}, {message_bytes}")
    if degree == 1:
        return 0.0
    alpha_ms, bytes_per_ms = _link(profile)
    return 2 * (degree - 1) * alpha_ms + 2 * (degree - 1) / degree * message_bytes / bytes_per_ms


def layers_reduce_ms(
    layers: int, hidden: int, tokens: int, degree: int, profile: Devices, batch: int = 1, value_bytes: float = 2.0
) -> float:
    """Milliseconds of the all-reduces of one forward pass over `tokens` new tokens of `batch` sequences: two per layer.

    Those of the vocabulary are left out: one more for the embedding, and the logits of the last token.
    """
    return REDUCES_PER_LAYER * layers * all_reduce_ms(hidden * batch * tokens * value_bytes, degree, profile)


def send_ms(message_bytes: float, profile: Devices) -> float:
    """Milliseconds of one message from device to device."""
    alpha_ms, bytes_per_ms = _link(profile)
    return alpha_ms + message_bytes / bytes_per_ms


def _link(profile: Devices) -> tuple[float, float]:
    if profile.link_alpha_us is None or profile.link_gb_per_s is None:
        raise UsageError(
            f"the profile {profile.name} must say link_alpha_us and link_gb_per_s to divide a model, but does not",
            "add both, each with its source",
        )
    return profile.link_alpha_us / 1e3, profile.link_gb_per_s * 1e6


def tensor_parallel_degree(needed_bytes: Callable[[int], float], profile: Devices, shape: Shape) -> int:
    """The least number of devices that divides the KV heads of `shape` and on each of which `needed_bytes(number)` fit.

    `needed_bytes` may say infinity where the model cannot be divided so. Raises Infeasible with the figures if none fits.
    """
    degrees = [n for n in range(1, profile.devices + 1) if shape.kv_heads % n == 0]
    needed = {n: needed_bytes(n) for n in degrees}
    for degree in degrees:
        if needed[degree] <= profile.memory_bytes:
            return degree
    tried = ", ".join(
        f"{needed[n] / 1e9:.2f} GB on {'one' if n == 1 else f'each of {n}'}"
        if math.isfinite(needed[n])
        else f"cannot be divided among {n}"
        for n in degrees
    )
    raise Infeasible(
        f"a device of {profile.name} has {profile.memory_bytes / 1e9:.2f} GB, but the candidate needs {tried} "
        f"({profile.devices} devices, {shape.kv_heads} KV heads to divide among them)",
        "",
    )


def split_shape(shape: Shape, degree: int) -> Shape:
    """What one of `degree` devices computes of a model: its heads, neurons and (at most) rows of the vocabulary.

    Raises Infeasible where heads or neurons do not divide.
    """
    for what, count in (("KV heads", shape.kv_heads), ("FFN neurons", shape.ffn)):
        if degree < 1 or count % degree:
            raise Infeasible(f"{count} {what} must be a multiple of the number of devices, but got {degree}", "")
    return replace(
        shape,
        heads=shape.heads // degree,
        kv_heads=shape.kv_heads // degree,
        ffn=shape.ffn // degree,
        vocab=-(-shape.vocab // degree),
    )


def split_candidate(candidate: Candidate, shape: Shape, degree: int) -> Candidate:
    """What one of `degree` devices computes of a candidate; use it with `split_shape`.

    Raises Infeasible with the layer that does not divide.
    """
    problem = split_problem(candidate, shape, degree)
    if problem is not None:
        raise Infeasible(problem, "")
    layers = tuple(
        replace(layer, ffn=layer.ffn // degree, kv_groups=layer.kv_groups // degree) for layer in candidate.layers
    )
    return replace(candidate, layers=layers)


def split_problem(candidate: Candidate, shape: Shape, degree: int) -> str | None:
    """Why a candidate cannot be divided among `degree` devices; None if it can."""
    if degree == 1:
        return None
    for i, layer in enumerate(candidate.layers):
        if degree < 1 or layer.kv_groups % degree:
            return f"layer {i} has {layer.kv_groups} KV heads, which must be a multiple of the {degree} devices"
        inner = layer.kv_groups * shape.heads_per_group * shape.head_dim
        for what, k, form in (("attention", inner, layer.attention_format), ("FFN", layer.ffn, layer.ffn_format)):
            whole = math.lcm(_group(form, k), _pattern_block(layer.pattern))
            if k % (degree * whole):
                return (
                    f"layer {i}: the inner width {k} of the {what} must be whole groups of {whole} on each of {degree} "
                    f"devices, but is {k / (degree * whole):g} groups"
                )
    return None


def _group(form: Format, k: int) -> int:
    """What K must stay a multiple of. One scale per channel holds for any part of a row, in runs that the engine knows."""
    if not form.is_integer:
        return 1
    return ENGINE_BLOCKS[-1] if form.group_size == PER_CHANNEL else group_for(form.group_size, k)


def _pattern_block(pattern: Pattern) -> int:
    return {"2:4": 4, "block": BLOCK}.get(pattern.kind, 1)


def degree_fact(degree: int, profile: Devices) -> Measurement:
    """`tensor_parallel_degree` as a fact of a prediction."""
    note = f"fewest of the {profile.devices} devices of {profile.name} that it fits"
    return Measurement(degree, "devices", degree, degree, "predicted", 0, "", note)


def pipeline_stages(block_bytes: Sequence[float], stages: int) -> list[range]:
    """Consecutive blocks (embedding, layers, head) in at most `stages` stages whose largest has the fewest bytes possible.

    Exact: the largest stage is one of the sums of consecutive blocks; greedy filling decides whether a bound can be kept.
    """
    if stages < 1 or not block_bytes:
        raise ValueError(f"a pipeline needs blocks and at least one stage, but got {len(block_bytes)}, {stages}")
    stages = min(stages, len(block_bytes))
    sums = sorted({sum(block_bytes[i:j]) for i in range(len(block_bytes)) for j in range(i + 1, len(block_bytes) + 1)})
    low, high = 0, len(sums) - 1
    while low < high:  # the largest sum, all in one stage, always can
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(block_bytes, sums[middle])) <= stages else (middle + 1, high)
    return _filled(block_bytes, sums[low])


def _filled(block_bytes: Sequence[float], bound: float) -> list[range]:
    """Stages filled up to `bound`; more of them than there are blocks where one block alone is larger."""
    if max(block_bytes) > bound:
        return [range(0)] * (len(block_bytes) + 1)
    found, start = [], 0
    for i in range(len(block_bytes)):
        if sum(block_bytes[start : i + 1]) > bound:
            found.append(range(start, i))
            start = i
    return [*found, range(start, len(block_bytes))]


def pipeline_ms(single_ms: float, stages: int, message_bytes: float, profile: Devices) -> float:
    """Milliseconds of one forward pass of one batch through `stages`: that of one device, and a message per boundary."""
    if stages < 1:
        raise ValueError(f"a pipeline needs at least one stage, but got {stages}")
    return single_ms + (stages - 1) * (send_ms(message_bytes, profile) if stages > 1 else 0.0)
