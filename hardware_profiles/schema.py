"""The schema of a target machine: a YAML file that a user can read and edit. Units are in the keys, every figure has a source.

Figures are ceilings of data sheets (or of `paretune hardware calibrate`), dense and per device; what an engine reaches of
them is a prior: `compute_efficiency`, `bandwidth_efficiency` and `overhead_us_per_op` are (low, likely, high), and the
interval of a prediction follows from them.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from paretune.hardware_profiles.kernels import ONNXRUNTIME_CPU, Kernel

# ONNX Runtime's names (get_all_providers of 1.32, and those that builds of its partners add); the other engines here take them, too.
PROVIDERS = tuple(
    f"{name}ExecutionProvider"
    for name in (
        *(
            "CPU",
            "CUDA",
            "Tensorrt",
            "NvTensorRTRTX",
            "ROCM",
            "MIGraphX",
            "OpenVINO",
            "Dnnl",
            "VitisAI",
            "QNN",
            "CoreML",
            "Dml",
        ),
        *("Xnnpack", "Nnapi", "VSINPU", "ACL", "ArmNN", "Js", "WebNN", "WebGpu", "CANN", "Rknpu", "Azure"),
    )
)
Engine = Literal["onnxruntime", "openvino", "torch", "tensorrt", "xla", "vitis"]
Kind = Literal["cpu", "gpu", "tpu", "fpga", "board"]
CPU_PROVIDER = "CPUExecutionProvider"

# What must have a source wherever it is given, and the priors, which must have one where they are not the defaults.
DEVICE_SPECS = (
    "bandwidth_gb_per_s",
    "cache_bytes",
    "cache_gb_per_s",
    "peak_fp32_tflops",
    "peak_fp16_tflops",
    "peak_int8_tops",
    "peak_int4_tops",
    "power_watts",
    "price_usd_per_hour",
    "link_alpha_us",
    "link_gb_per_s",
)
PRIORS = ("overhead_us_per_op", "compute_efficiency", "bandwidth_efficiency")
# Sources may also be given for what need not have one.
SOURCED = (*DEVICE_SPECS, *PRIORS, "memory_bytes", "weight_formats", "sparse_patterns")

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Peak = Annotated[float, Field(gt=0, le=1e5, allow_inf_nan=False)]
Range = tuple[float, float, float]


class Profile(BaseModel):
    """What a target is and what it executes.

    `at_hand` says whether this machine can measure it; others are predicted. `weight_formats` lists `<weights>/<activations>`
    pairs that its engine has a kernel for (kernels.py says what each does); a pair that is missing is not proposed, and of the
    others only those of the precisions that a search asks for. `sparse_patterns` lists the patterns that a kernel exploits: any
    other gains bytes, never time. What a step reads comes at `cache_gb_per_s` if it all fits `cache_bytes`. `peak_fp16_tflops`
    is of 16-bit floats of either kind, accumulated in fp32; None where the engine computes them in fp32. `peak_int4_tops` is of
    int4 weights and activations, which no kernel of ours has. `power_watts`, `price_usd_per_hour`, `memory_bytes` and the peaks
    are of one of the `devices`, between which one message takes `link_alpha_us` plus its bytes at `link_gb_per_s` (per
    direction).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    description: str
    kind: Kind = "cpu"
    engine: Engine = "onnxruntime"
    execution_provider: str = CPU_PROVIDER
    engine_version: str
    at_hand: bool = True
    threads: int = Field(ge=1, le=1024)
    cores: int = Field(ge=1)
    cpu: str
    isa: tuple[str, ...] = ()
    memory_bytes: int = Field(ge=1_000_000)
    bandwidth_gb_per_s: Peak | None = None
    cache_bytes: int | None = Field(default=None, ge=1024)
    cache_gb_per_s: Peak | None = None
    peak_fp32_tflops: Peak | None = None
    peak_fp16_tflops: Peak | None = None
    peak_int8_tops: Peak | None = None
    peak_int4_tops: Peak | None = None
    power_watts: Amount | None = None
    price_usd_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    devices: int = Field(default=1, ge=1, le=65536)
    link_alpha_us: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    link_gb_per_s: Peak | None = None
    overhead_us_per_op: Range = (0.4, 1.2, 4.0)
    compute_efficiency: Range = (0.3, 0.55, 0.85)
    bandwidth_efficiency: Range = (0.4, 0.65, 0.9)
    weight_formats: tuple[Kernel, ...] = tuple(ONNXRUNTIME_CPU)
    sparse_patterns: tuple[Literal["2:4", "unstructured"], ...] = ()
    # URL of the `paretune agent` that measures this target; never with credentials, those are in PARETUNE_AGENT_TOKEN.
    agent: str | None = Field(default=None, pattern=r"^https?://[A-Za-z0-9.-]+:[0-9]{1,5}/?$")
    sources: dict[str, str] = Field(default={}, validate_default=True)
    source: str

    @field_validator("execution_provider")
    @classmethod
    def _is_known(cls, value: str, info: ValidationInfo) -> str:
        engine = info.data.get("engine")
        if engine in ("onnxruntime", "openvino", "torch") and value not in PROVIDERS:
            near = difflib.get_close_matches(value, PROVIDERS, 1)
            raise ValueError(
                f"{engine} has no execution provider called {value!r}; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(PROVIDERS)}")
            )
        return value

    @field_validator("weight_formats")
    @classmethod
    def _has_the_teachers_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "fp32/fp32" not in value:
            raise ValueError(
                "fp32/fp32 must be among the weight formats, because the fp32 teacher is what all is compared with"
            )
        return value

    @field_validator("peak_int8_tops")
    @classmethod
    def _integers_are_not_that_slow(cls, value: float | None, info: ValidationInfo) -> float | None:
        half = info.data.get("peak_fp16_tflops")
        if value is not None and half is not None and value < half / 4:
            raise ValueError(
                f"the int8 peak must be at least a quarter of the fp16 peak ({half:g} TFLOP/s); is it in TOPS, and dense?"
            )
        return value

    @field_validator("compute_efficiency", "bandwidth_efficiency")
    @classmethod
    def _are_fractions(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1] <= value[2] <= 1:
            raise ValueError("0 < low <= likely <= high <= 1 must hold for an efficiency, a fraction of the peak")
        return value

    @field_validator("overhead_us_per_op")
    @classmethod
    def _are_ordered(cls, value: Range) -> Range:
        if not 0 <= value[0] <= value[1] <= value[2] <= 1e5:
            raise ValueError(
                "0 <= low <= likely <= high <= 1e5 must hold for the microseconds that an op costs at least"
            )
        return value

    @field_validator("sources")
    @classmethod
    def _every_figure_has_one(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for key in value:
            if key not in SOURCED:
                near = difflib.get_close_matches(key, SOURCED, 1, 0.5)
                raise ValueError(
                    f"{key!r} is no figure; " + (f"did you mean {near[0]!r}?" if near else f"known: {SOURCED}")
                )
        given = [name for name in DEVICE_SPECS if info.data.get(name) is not None]
        given += [name for name in PRIORS if name in info.data and info.data[name] != cls.model_fields[name].default]
        for name in given:
            if not value.get(name, "").strip():
                raise ValueError(
                    f"{name} has no source: write under `sources` where the figure is from, or `from memory` if it is"
                )
        return value

    @model_validator(mode="after")
    def _can_be_predicted_or_measured(self) -> Profile:
        if not self.at_hand and self.agent is None and not self.can_predict:
            raise ValueError(
                f"a target that is not at hand is predicted, which takes bandwidth_gb_per_s and peak_fp32_tflops, "
                f"but {self.name} lacks {' and '.join(self.missing_figures)}"
            )
        if self.devices > 1 and (self.link_alpha_us is None or self.link_gb_per_s is None):
            raise ValueError(
                f"{self.devices} devices exchange messages, so link_alpha_us and link_gb_per_s must be given"
            )
        return self

    @property
    def missing_figures(self) -> tuple[str, ...]:
        """Figures that a prediction needs and this profile lacks."""
        return tuple(name for name in ("bandwidth_gb_per_s", "peak_fp32_tflops") if getattr(self, name) is None)

    @property
    def can_predict(self) -> bool:
        """Whether latencies can be predicted from the figures."""
        return not self.missing_figures

    @property
    def from_memory(self) -> tuple[str, ...]:
        """Figures whose source says that they are remembered, not read."""
        return tuple(name for name in SOURCED if "from memory" in self.sources.get(name, "").lower())

    @property
    def computes_half(self) -> bool:
        """Whether 16-bit floats are multiplied as such. ONNX Runtime on a CPU makes them fp32 first."""
        on_cpu = self.engine == "onnxruntime" and self.execution_provider == CPU_PROVIDER
        return self.peak_fp16_tflops is not None and not on_cpu
