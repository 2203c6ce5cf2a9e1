"""What a client asks an agent to measure: files by their digests, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from paretune.objectives.agent.store import DIGEST
from paretune.objectives.latency.workload import NEW_TOKENS, PROMPT

ID = re.compile(r"[a-z0-9-]{1,64}")
# The name under which a model looks for its weights when they are not inside it.
DATA_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}\.onnx\.data")
WORD = re.compile(r"[A-Za-z0-9]{1,64}")
ENGINES = ("onnxruntime", "openvino", "torch")


@dataclass(frozen=True)
class Order:
    """`key`: chosen by the client, the same in every repetition of one order, which then makes one job. `model`, `reference`
    and `data` are SHA-256 digests; `data` (with the name that the model gives it) is of weights outside the model, or empty.
    `visits`: "full" (several fresh pairs of processes, memory, load time) or "one" (one pair, latencies only).
    `within`: half-width of the 95 % intervals to reach, as a fraction; None is content with what the usual visits give.
    `prompt` and `new_tokens` are what is timed, fewer than usual for a model with a short context."""

    key: str
    model: str
    reference: str
    threads: int
    visits: str = "full"
    data: str = ""
    data_name: str = ""
    engine: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    within: float | None = None
    prompt: int = PROMPT
    new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        for name, pattern, optional in (
            ("key", ID, False),
            ("model", DIGEST, False),
            ("reference", DIGEST, False),
            ("data", DIGEST, True),
            ("data_name", DATA_NAME, True),
            ("provider", WORD, False),
        ):
            value = getattr(self, name)
            if not (optional and value == "") and not (isinstance(value, str) and pattern.fullmatch(value)):
                raise ValueError(f"{name} must match {pattern.pattern}, but got {value!r:.100}")
        if type(self.threads) is not int or not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be between 1 and 1024, but got {self.threads!r:.100}")
        if self.visits not in ("full", "one"):
            raise ValueError(f"visits must be full or one, but got {self.visits!r:.100}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, but got {self.engine!r:.100}")
        if self.within is not None and not (type(self.within) in (int, float) and 0 < self.within < 1):
            raise ValueError(f"within must be between 0 and 1, but got {self.within!r:.100}")
        for name, most in (("prompt", PROMPT), ("new_tokens", NEW_TOKENS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be between 1 and {most}, but got {value!r:.100}")
        if bool(self.data) != bool(self.data_name):
            raise ValueError("data and data_name must be given together, but one of them is empty")

    @property
    def digests(self) -> frozenset[str]:
        """The files that the order needs."""
        return frozenset({self.model, self.reference, self.data} - {""})

    def to_dict(self) -> dict[str, Any]:
        """Usual lengths are left out: an agent of an earlier version does not know them."""
        told = asdict(self)
        if (self.prompt, self.new_tokens) == (PROMPT, NEW_TOKENS):
            del told["prompt"], told["new_tokens"]
        return told

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Order:
        """Raises ValueError for whatever is no order."""
        if not isinstance(data, Mapping):
            raise ValueError(f"an order is a JSON object, but got {type(data).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"an order has the keys {', '.join(sorted(known))}, but got {', '.join(unknown)[:100]}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"an order must be complete: {error}") from None
