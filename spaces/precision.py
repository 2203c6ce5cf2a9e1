"""Which precisions a search may choose from, by the names that people use; a profile's kernels narrow them further.

The default is fp32, int8 and int4. What else there is stays off until asked for, because for decoding in ONNX Runtime int8 or
int4 beats it: fp16 and bf16 only halve the file; dynamic and static int8 lose more and decode slower (they prefill faster:
ask for them where `ttft_ms` is an objective); int2 loses far more than it saves. docs/log.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paretune.hardware_profiles.kernels import Kernel
from paretune.spaces.candidate import Algorithm

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-static", "int4", "int2"]

KERNELS_OF: dict[Precision, tuple[Kernel, ...]] = {
    "fp32": ("fp32/fp32",),
    "fp16": ("fp16/fp32",),
    "bf16": ("bf16/fp32",),
    "int8": ("int8/int8", "int8/fp32"),
    "int8-dynamic": ("int8/dynamic",),
    "int8-static": ("int8/static",),
    "int4": ("int4/int8", "int4/fp32"),
    "int2": ("int2/int8", "int2/fp32"),
}
DEFAULT_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class PrecisionChoices:
    """`names` of precisions; `group_sizes` of integer weights (0: per channel); `quantizers` that may find the codes of int4 and
    int2 matrices, None: rounding to nearest, and GPTQ where second-order methods are on."""

    names: tuple[Precision, ...] = DEFAULT_PRECISIONS
    group_sizes: tuple[int, ...] = GROUP_SIZES
    quantizers: tuple[Algorithm, ...] | None = None

    def of(self, kernels: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a profile's `kernels` that belong to a chosen precision, in the profile's order."""
        chosen = {kernel for name in self.names for kernel in KERNELS_OF[name]}
        return tuple(kernel for kernel in kernels if kernel in chosen)

    def missing(self, kernels: tuple[str, ...]) -> tuple[Precision, ...]:
        """Precisions that were asked for beyond the default, of which `kernels` has none."""
        wanted = (name for name in self.names if name not in DEFAULT_PRECISIONS)
        return tuple(name for name in wanted if not set(KERNELS_OF[name]) & set(kernels))


DEFAULT_CHOICES = PrecisionChoices()
