"""The engines, the module of each, and what to install where one is missing. Importing this loads none of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from paretune.common.errors import EnvironmentProblem, UsageError


@dataclass(frozen=True)
class Engine:
    """`module` has `open_model(path, threads, provider)`; it imports `library`, which `install` installs.

    `reads_accuracy_level`: whether it rounds activations to 8 bits where a MatMulNBits says so. One that does not computes with
    them as floats: more exactly than what was scored, and at another speed.
    """

    module: str
    library: str
    install: str
    reads_accuracy_level: bool = True


ENGINES = {
    "onnxruntime": Engine("onnxruntime.decoder", "onnxruntime", "pip install onnxruntime"),
    "openvino": Engine("openvino.decoder", "openvino", "pip install openvino", reads_accuracy_level=False),
    "torch": Engine("torch.decoder", "torch", "pip install torch onnx"),
}


def engine_module(name: str) -> ModuleType:
    """Import an engine. Raises UsageError for an unknown name, EnvironmentProblem with what to install for a missing one."""
    if name not in ENGINES:
        raise UsageError(f"no engine is called {name!r}", f"known: {', '.join(ENGINES)}")
    engine = ENGINES[name]
    try:
        return importlib.import_module(f"paretune.engines.{engine.module}")
    except ImportError as error:
        raise EnvironmentProblem(f"the engine {name} cannot be imported: {error}", engine.install) from None
