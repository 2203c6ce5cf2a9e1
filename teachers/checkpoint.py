"""Training state on disk: safetensors plus JSON in its header, written atomically. Pickle is never used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paretune.hardware_profiles.files import sync_folder

# What reading a damaged file raises.
DAMAGED = (SafetensorError, KeyError, ValueError, TypeError)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Save tensors and a JSON-able `meta` in one safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"meta": json.dumps(dict(meta))},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Memory-map a file of `save_tensors`: (tensors by name, meta)."""
    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get("meta", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of a file of `save_tensors`, without its tensors."""
    with safe_open(path, "pt") as file:
        meta: dict[str, Any] = json.loads((file.metadata() or {}).get("meta", "{}"))
        return meta


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The optimizers' state as flat named tensors: `optimizer.parameter.field`."""
    flat = {}
    for i, optimizer in enumerate(optimizers):
        for index, fields in optimizer.state_dict()["state"].items():
            for field, value in fields.items():
                flat[f"optimizer{i}.{index}.{field}"] = torch.as_tensor(value)
    return flat


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `optimizer_tensors`; the optimizers must be built over the same parameters in the same order."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            prefix, _, rest = name.partition(".")
            if prefix == f"optimizer{i}":
                index, field = rest.split(".", 1)
                state.setdefault(int(index), {})[field] = tensor.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
