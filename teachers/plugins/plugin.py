"""Teachers that are any torch module: the interface of a plug-in, and how one is found by its name.

A plug-in is code of its author, run with the rights of whoever names it: an installed package that declares the entry point
`paretune.teachers`, or a class named by module and class. It is imported only when a search asks for it.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from paretune.common.errors import UsageError
from paretune.teachers.plugins.name import ENTRY_POINTS, PREFIX
from paretune.teachers.text.corpus import Split

PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """One batch: the tensors that `forward` takes, batch dimension first, and whatever a quality function compares with.

    All batches of a plug-in have the same input shapes and dtypes; latency is that of one forward at this shape.
    """

    inputs: tuple[torch.Tensor, ...]
    target: Any = None


@dataclass(frozen=True)
class Quality:
    """A quality and how it is computed: `function(outputs, batch)` gives one float per example [examples], or one per batch [].

    `unit` is shown with every value ("squared error/pixel", "dB", "fraction"). The reported value is the mean; its interval
    comes from resampling the examples.
    """

    name: str
    unit: str
    direction: Literal["minimize", "maximize"]
    function: Callable[[Outputs, Batch], torch.Tensor]

    @property
    def objective(self) -> str:
        """The name under which it is minimized: its own, or with `negative_` in front."""
        return self.name if self.direction == "minimize" else f"negative_{self.name}"

    @property
    def sign(self) -> float:
        """What a value is multiplied by to be minimized."""
        return 1.0 if self.direction == "minimize" else -1.0


@dataclass(frozen=True)
class Width:
    """A width that the plug-in can cut: its choices ascending, the module's own last (`Width("channels", (8, 12, 16))`)."""

    name: str
    choices: tuple[int, ...]


class TeacherPlugin(ABC):
    """What the author of a plug-in writes. The first quality is the one that is searched for; all are reported.

    Everything must be deterministic: the module is loaded in several processes, which must see the same weights and batches.
    """

    name: str
    qualities: Sequence[Quality]
    # For structural pruning; without, precision and masks are searched.
    widths: Sequence[Width] = ()
    # What the student learns from the teacher's outputs: "kl" if they are logits over the last dimension.
    distillation: Literal["mse", "kl"] = "mse"

    @abstractmethod
    def load(self) -> nn.Module:
        """The trained module on the CPU."""

    @abstractmethod
    def batches(self, split: Split) -> Sequence[Batch]:
        """Batches of "train" (distillation), "calibration" (activations), "search" and "report" (quality); disjoint data."""

    def forward(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor | Outputs:
        """What is computed, compared, exported and timed."""
        found: torch.Tensor | Outputs = module(*inputs)
        return found

    def slice(self, module: nn.Module, widths: Mapping[str, int]) -> nn.Module:
        """A new, smaller module with parts of the weights of `module`, whose parameters keep their names."""
        raise NotImplementedError(f"{self.name} names widths, so it must say how to slice")


class Forwarding(nn.Module):
    """A module called as its plug-in says; outputs always as a tuple. Its parameters are those of `module`."""

    def __init__(self, plugin: TeacherPlugin, module: nn.Module) -> None:
        super().__init__()
        self.plugin, self.module = plugin, module

    def forward(self, *inputs: torch.Tensor) -> Outputs:
        """Return the plug-in's outputs for `inputs`, always as a tuple."""
        outputs = self.plugin.forward(self.module, *inputs)
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)

    def with_weights(self, weights: Mapping[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Outputs:
        """The outputs with other weights, named as in `module`."""
        named = {f"module.{name}": value for name, value in weights.items()}
        found: Outputs = torch.func.functional_call(self, named, inputs)
        return found


class PluginTeacher:
    """A loaded plug-in: what the search asks a teacher for."""

    def __init__(self, plugin: TeacherPlugin) -> None:
        self.plugin, self.name = plugin, plugin.name

    @cached_property
    def module(self) -> nn.Module:
        """The module in evaluation mode, without gradients. Raises UsageError if `load` gives something else."""
        module = self.plugin.load()
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"load() of the plug-in {self.name} must give a torch.nn.Module, but gave {type(module).__name__}",
                "return the trained module itself",
            )
        return still(module)

    @property
    def parameters(self) -> int:
        """Number of parameters of the module."""
        return sum(p.numel() for p in self.module.parameters())

    @cached_property
    def digest(self) -> str:
        """16 hex digits over all weights and buffers and the first report batch."""
        digest = hashlib.sha256(self.name.encode())
        tensors = [*self.module.state_dict().items(), *enumerate(self.plugin.batches("report")[0].inputs)]
        for name, value in tensors:
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def still(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, without gradients."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def find_plugin(teacher: str, folder: Path | None = None) -> TeacherPlugin:
    """The plug-in of `plugin:NAME` (an installed entry point) or `plugin:MODULE:CLASS` (looked up in `folder` too).

    Imports, and so executes, the author's code. Raises UsageError.
    """
    name = teacher.removeprefix(PREFIX)
    found = _by_class(name, folder) if ":" in name else _by_entry_point(name)
    if isinstance(found, type) and issubclass(found, TeacherPlugin):
        with explained(name, "made without arguments"):
            found = found()
    if not isinstance(found, TeacherPlugin):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise UsageError(
            f"a teacher plug-in must be a paretune.teachers.plugins.plugin.TeacherPlugin, but {name} is {kind}",
            "derive its class from TeacherPlugin",
        )
    if not isinstance(getattr(found, "name", None), str) or not PLAIN_NAME.match(found.name):
        raise UsageError(
            f"a plug-in's name must have letters, digits, '_' and '-' only, but {name} has {getattr(found, 'name', None)!r}",
            'give it one: name = "digits"',
        )
    return found


def plugin_names() -> list[str]:
    """Names of the installed plug-ins."""
    return sorted(entry_points(group=ENTRY_POINTS).names)


def _by_entry_point(name: str) -> Any:
    matching = entry_points(group=ENTRY_POINTS, name=name)
    if not matching:
        known = ", ".join(plugin_names()) or "none"
        raise UsageError(
            f"no installed package has a teacher plug-in {name!r} (entry point {ENTRY_POINTS}); found: {known}",
            "install its package, or name its class: --teacher plugin:MODULE:CLASS",
        )
    with explained(name, "imported"):
        return next(iter(matching)).load()


def _by_class(name: str, folder: Path | None) -> Any:
    module, _, attribute = name.partition(":")
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end: nothing installed is hidden by a file that lies there
    with explained(name, "imported"):
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    return found


class explained:
    """Whatever a plug-in's own code raises becomes a UsageError that says where it came from."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, UsageError):
            raise UsageError(
                f"the plug-in {self.name} cannot be {self.what}: {type(error).__name__}: {error}",
                "mend the plug-in; `python -c` with the same import shows the whole error",
            ) from error
