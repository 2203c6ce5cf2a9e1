"""What a search is asked to do: a YAML file, a preset and options, merged into one frozen value."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from paretune.common.errors import RenamedSetting, UsageError
from paretune.common.text import require_text
from paretune.common.validation import said
from paretune.common.yaml_file import load_model
from paretune.spaces.candidate import PER_CHANNEL, Algorithm
from paretune.spaces.precision import DEFAULT_PRECISIONS, Precision, PrecisionChoices
from paretune.teachers.plugins.name import is_plugin

# Of decoders; the throughput is maximized, and a limit to it is the least that will do.
OBJECTIVES = (
    "nll",
    "decode_ms_per_token",
    "ttft_ms",
    "throughput_tokens_per_s",
    "compressed_bytes",
    "bytes",
    "peak_memory_bytes",
    "energy_j_per_token",
    "usd_per_million_tokens",
)
Limited = Literal[
    "decode_ms_per_token",
    "ttft_ms",
    "throughput_tokens_per_s",
    "forward_ms",
    "compressed_bytes",
    "bytes",
    "peak_memory_bytes",
    "energy_j_per_token",
    "usd_per_million_tokens",
]
# Bounds are far beyond what any machine does; they keep infinities and slips of the keyboard out of what is stored and planned.
MOST_BUDGET_DAYS = 365
MOST_LOSS = 1e3  # a fraction
MOST_TOKENS = 10**9
MOST_CANDIDATES, MOST_FINALISTS = 10**6, 10**4
MOST_SEED = 2**32 - 1
MOST_NAME, MOST_PATH, MOST_TARGETS = 200, 4096, 64
MOST_WORKERS = 1024
Positive = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Loss = Annotated[float, Field(gt=0, le=MOST_LOSS, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**7)]
Name = Annotated[str, Field(min_length=1, max_length=MOST_NAME)]
Place = Annotated[str, Field(min_length=1, max_length=MOST_PATH)]
LAYOUT = ("workers", "threads_per_trial")
RENAMED = {"max_loss": "qat_threshold"}  # old name to new
DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(s|m|h|d)")
PERCENTAGE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*%")
UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Shares(BaseModel):
    """How the budget is divided; what a stage leaves over goes on to the next."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    elastic: float = Field(default=0.25, ge=0, le=0.9, allow_inf_nan=False, description="elastic student")
    explore: float = Field(default=0.28, gt=0, le=0.9, allow_inf_nan=False, description="rung-0 candidates")
    confirm: float = Field(default=0.38, gt=0, le=0.9, allow_inf_nan=False, description="recovery and confirmation")

    @model_validator(mode="after")
    def _leave_something(self) -> Shares:
        if self.elastic + self.explore + self.confirm > 0.99:
            raise ValueError(
                "elastic + explore + confirm must leave something for baselines and latency fit (at most 0.99)"
            )
        return self


class Reference(BaseModel):
    """The corner below which a front's volume is counted: `loss` is a relative NLL increase over the fp32 teacher, `times` a
    multiple of the teacher's latency and bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: Loss = 0.25
    times: Loss = 1.1


class Recovery(BaseModel):
    """What a finalist's training minimizes, and what of the teacher is kept on disk.

    kl_weight T² KL to the teacher at temperature T, ce_weight cross-entropy on the text, hidden_weight squared difference of
    normalised hidden states (same hidden width only). `cached_labels` is the number of likeliest tokens per position whose
    teacher probabilities are kept for the next recovery (0: none, the teacher runs every time), in 512 MB at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)
    kl_weight: Weight = 0.9
    ce_weight: Weight = 0.1
    hidden_weight: Weight = 0.0
    cached_labels: int = Field(default=0, ge=0, le=4096)

    @model_validator(mode="after")
    def _learns_something(self) -> Recovery:
        if self.kl_weight + self.ce_weight + self.hidden_weight == 0:
            raise ValueError(
                "kl_weight, ce_weight and hidden_weight must not all be 0, or there is nothing to learn from"
            )
        return self


class StudentConfig(BaseModel):
    """A student's size that the search must look at: numbers of layers, FFN neurons and KV groups; `hidden` is the width."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Count
    ffn: Count
    kv_groups: Count
    hidden: Count | None = None


class Spec(BaseModel):
    """Settings of one search. Durations are like `90s`, `45m`, `8h`.

    `second_order` adds GPTQ and SparseGPT to the space; a candidate then takes longer to score. `mixed_precision` adds
    candidates whose layers differ in precision, by how much each loses. `hidden` adds cuts of the
    residual stream. `keep_zeros` takes the zeros of a pruned teacher as given masks, which a candidate can keep through
    recovery; masks that `torch.nn.utils.prune` left in the checkpoint are always taken.
    `precisions` are those that may be proposed (spaces/precision.py says why not all are by default), `group_sizes` those of
    integer weights, "channel" one per output row; `quantizers` may find the codes of int4 and int2 matrices.
    `loss_of_interest` is the NLL increase over the teacher, as a fraction, beyond which a student is not worth confirming:
    the sampler is kept below it and finalists come from below it. `sampler: sequential` searches one axis after the other
    (size, mask, precision) instead of jointly, for comparison; `reference` is what fronts are compared by.
    `qat_threshold` is the NLL increase that post-training quantization may cost before a 4-bit finalist is trained under its
    rounding (QAT): a fraction or `1%`; without it QAT goes to those who would be on the front if rounding cost nothing.
    `limits` are upper bounds, of `throughput_tokens_per_s` the lower one. `energy_j_per_token` and `usd_per_million_tokens` need the
    profile's power and price.
    `student_configs` are sizes that are explored first, each unquantized and at the engine's integer precisions.
    `targets` are further profiles (names or YAML files): the search is for `profile`, then every confirmed candidate gets its cost on
    each of them, measured where that machine is at hand, else predicted.
    `workers` tasks run at once, each on `threads_per_trial` threads; by default one worker uses all cores of the profile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: Place = "stdlib-coder"
    data: Place | None = None
    field: Name | None = None
    profile: Place = "local-cpu"
    targets: tuple[Place, ...] = Field(default=(), max_length=MOST_TARGETS)
    budget: str = Field("9m", max_length=100)
    sampler: Literal["tpe", "nsga2", "sequential"] = "tpe"
    seed: int = Field(0, ge=0, le=MOST_SEED)
    objectives: tuple[Name, ...] = ("nll", "decode_ms_per_token", "compressed_bytes")
    limits: dict[Limited, Positive] = Field(default_factory=dict)
    second_order: bool = False
    precisions: tuple[Precision, ...] = DEFAULT_PRECISIONS
    group_sizes: tuple[Literal[32, 64, 128, 256, "channel"], ...] = (32, 64, 128)
    quantizers: tuple[Algorithm, ...] | None = None
    mixed_precision: bool = True
    hidden: bool = False
    keep_zeros: bool = False
    loss_of_interest: Loss = 0.25
    qat_threshold: Loss | None = None
    recovery: Recovery = Recovery()
    student_configs: tuple[StudentConfig, ...] = Field(default=(), max_length=100)
    search_tokens: int = Field(24_000, ge=256, le=MOST_TOKENS)
    report_tokens: int = Field(40_000, ge=256, le=MOST_TOKENS)
    fit_points: int = Field(40, ge=8, le=200)
    max_candidates: int = Field(2000, ge=1, le=MOST_CANDIDATES)
    finalists: int = Field(9, ge=1, le=MOST_FINALISTS)
    shares: Shares = Shares()
    reference: Reference = Reference()
    workers: int | None = Field(None, ge=1, le=MOST_WORKERS)
    threads_per_trial: int | None = Field(None, ge=1, le=MOST_WORKERS)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        require_text(value)
        return renamed(value)

    @field_validator("precisions", "group_sizes", "quantizers", "student_configs")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        twice = next((item for item in value or () if value is not None and value.count(item) > 1), None)
        if twice is not None:
            raise ValueError(f"each must be named once, but got {twice!r} twice")
        return value

    @field_validator("budget")
    @classmethod
    def _is_duration(cls, value: str) -> str:
        seconds(value)
        return value

    @field_validator("qat_threshold", mode="before")
    @classmethod
    def _percentage(cls, value: object) -> object:
        if isinstance(value, str) and (match := PERCENTAGE.fullmatch(value.strip())):
            return float(match[1]) / 100
        return value

    @field_validator("objectives")
    @classmethod
    def _has_quality(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if len(set(value)) != len(value) or len(value) < 2:
            raise ValueError("two or more different objectives are needed")
        if is_plugin(str(info.data.get("teacher", ""))):
            return value  # what they can be is known when the plug-in is loaded
        if "nll" not in value or not set(value) <= set(OBJECTIVES):
            raise ValueError(f"objectives are nll and others of {', '.join(OBJECTIVES[1:])}")
        return value

    @field_validator("precisions")
    @classmethod
    def _has_the_teachers_own(cls, value: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if "fp32" not in value:
            raise ValueError("fp32 must be among the precisions, because the fp32 teacher is what all is compared with")
        return value

    @field_validator("group_sizes")
    @classmethod
    def _has_a_size(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("at least one group size is needed")
        return value

    @field_validator("quantizers")
    @classmethod
    def _has_rounding(cls, value: tuple[Algorithm, ...] | None) -> tuple[Algorithm, ...] | None:
        if value is not None and "rtn" not in value:
            raise ValueError("rtn must be among the quantizers, because the baselines are rounded to nearest")
        return value

    @property
    def choices(self) -> PrecisionChoices:
        """The precisions, group sizes and quantizers in the form that the space takes."""
        sizes = tuple(PER_CHANNEL if size == "channel" else size for size in self.group_sizes)
        return PrecisionChoices(self.precisions, sizes, self.quantizers)

    @property
    def budget_s(self) -> float:
        """The budget in seconds."""
        return seconds(self.budget)

    @property
    def most_finalists(self) -> int:
        """How many are recovered at most, when `finalists` of them leave time over."""
        return 4 * self.finalists

    def digest(self) -> str:
        """Return 12 hex digits, the same for the same settings; without further targets, as in versions before them.

        How many workers there are is not part of it: a study can go on with another number.
        """
        settings = self.model_dump(mode="json")
        for old, new in RENAMED.items():  # studies are found again by the digest of their first name
            settings[old] = settings.pop(new)
        if not self.targets:
            del settings["targets"]
        for name in LAYOUT:
            del settings[name]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"budget": "9m"},
    "overnight": {"budget": "8h", "report_tokens": 1_000_000, "fit_points": 80, "finalists": 60},
}


def renamed(value: Any) -> Any:
    """Settings with today's names for RENAMED keys; a RenamedSetting warning tells of each that has a value."""
    if not isinstance(value, Mapping):
        return value
    found = dict(value)
    for old, new in RENAMED.items():
        if old in found and new not in found:
            found[new] = found.pop(old)
            if found[new] is not None:
                warnings.warn(
                    f"the setting {old} has been renamed to {new}; the old name still works",
                    RenamedSetting,
                    stacklevel=2,
                )
    return found


def seconds(duration: str) -> float:
    """Seconds of a duration such as 90s, 45m, 8h. Raises ValueError."""
    match = DURATION.fullmatch(duration.strip())
    if match is None or float(match[1]) <= 0:
        shown = duration if len(duration) < 60 else f"{duration[:60]}…"
        raise ValueError(f"a duration is a positive number and s, m, h or d, such as 45m or 8h, but got {shown!r}")
    found = float(match[1]) * UNIT_SECONDS[match[2]]
    if found > MOST_BUDGET_DAYS * UNIT_SECONDS["d"]:
        raise ValueError(f"a duration is at most {MOST_BUDGET_DAYS}d, but got {duration!r}")
    return found


def make_spec(file: Path | None, preset: str | None, options: dict[str, Any]) -> Spec:
    """Preset, then YAML file, then command-line options (those that are not None); raises UsageError."""
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"a preset is one of {', '.join(PRESETS)}, but got {preset!r}", "choose one of them")
    merged: dict[str, Any] = dict(PRESETS[preset or "quick"])
    if file is not None:
        merged |= load_model(file, Spec).model_dump(exclude_unset=True)
    merged |= {name: value for name, value in options.items() if value is not None}
    for name in ("teacher", "data"):  # the same search from another directory is the same search
        value = merged.get(name)
        if value == "":
            raise UsageError(f"--{name} must name a file or folder, but is empty", "name one, or leave the option out")
        with contextlib.suppress(OSError, ValueError):  # an impossible path is refused where it is read
            if isinstance(value, str) and Path(value).exists():
                merged[name] = str(Path(value).resolve())
    try:
        return Spec.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{name}: {said(first)}", "change that option") from None
