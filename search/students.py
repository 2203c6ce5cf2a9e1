"""Sizes that a user asks for: checked against what can be sliced from the teacher, and put among the space's widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paretune.common.errors import UsageError
from paretune.search.spec import StudentConfig
from paretune.spaces.candidate import Candidate
from paretune.spaces.space import Space

FFN_STEP = 32  # the engine's smallest usual block of inputs of down_proj


def with_students(space: Space, configs: Sequence[StudentConfig]) -> Space:
    """The space with the FFN widths of `configs` among its choices. Raises UsageError for a size that is no slice."""
    for number, config in enumerate(configs, 1):
        _check(space, config, f"student_configs, entry {number}")
    widths = {config.ffn for config in configs} - set(space.ffn_widths)
    return replace(space, extra_ffn=tuple(sorted(widths))) if widths else space


def student_seeds(space: Space, configs: Sequence[StudentConfig]) -> list[Candidate]:
    """Each size unquantized and at the engine's integer precisions, for `space` as `with_students` made it."""
    found = []
    for config in configs:
        for index in reversed(range(len(space.levels))):
            params: dict[str, Any] = {
                **space.encode(space.baselines()[0]),
                "depth": config.layers,
                "ffn": space.ffn_widths.index(config.ffn),
                "kv_groups": config.kv_groups,
                **dict.fromkeys(("attention_bits", "ffn_bits", "head_bits", "embedding_bits"), index),
            }
            if config.hidden is not None and len(space.hidden_widths) > 1:
                params["hidden"] = len(space.hidden_widths) - 1 - space.hidden_widths.index(config.hidden)
            found.append(space.decode(params))
    return list(dict.fromkeys(found))


def _check(space: Space, config: StudentConfig, where: str) -> None:
    shape = space.shape
    limits = (
        ("layers", config.layers, space.min_depth, shape.layers),
        ("ffn", config.ffn, space.min_ffn, shape.ffn),
        ("kv_groups", config.kv_groups, space.min_kv_groups, shape.kv_heads),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            why = (
                "; the budget allows mild cuts only, a longer --budget allows more"
                if space.mild and value < low
                else ""
            )
            raise UsageError(
                f"{where}: {name} must be {low} to {high} to be a slice of this teacher{why}, but got {value}",
                f"choose {name} from {low} to {high}",
            )
    if config.ffn % FFN_STEP and config.ffn != shape.ffn:
        nearest = max(space.min_ffn, config.ffn - config.ffn % FFN_STEP)
        raise UsageError(
            f"{where}: ffn must be a multiple of {FFN_STEP} to be quantized in groups, but got {config.ffn}",
            f"write {nearest}",
        )
    if config.hidden is not None and config.hidden not in space.hidden_widths:
        widths, searched = ", ".join(map(str, space.hidden_widths)), len(space.hidden_widths) > 1
        raise UsageError(
            f"{where}: hidden must be one of {widths} in this search, but got {config.hidden}",
            "choose one of them" if searched else "leave hidden out, or search the residual width with `hidden: true`",
        )
