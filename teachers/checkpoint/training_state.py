"""Training state on disk: safetensors plus JSON in its header, written atomically. Pickle is never used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from paretune.common.files import sync_folder

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# What reading a damaged file raises.
DAMAGED = (SafetensorError, KeyError, ValueError, TypeError)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Save tensors and a JSON-able `meta` in one safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_tensors(temporary, tensors, {"meta": json.dumps(dict(meta))})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
    """A safetensors file, one tensor after the other: safetensors' own writer first copies all of them into bytes."""
    header: dict[str, Any] = {"__metadata__": dict(meta)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        kind, size = NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


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
