"""A checkpoint as it lies on disk: which files belong to it, what tensors they hold, whether every number is finite.

Reads headers and bytes only (no torch, no copy of a tensor), so a driver can check a model that it never holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paretune.common.errors import UsageError
from paretune.common.file_access import is_file, require_readable, unreadable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MIN_HEADER_BYTES = 10
CHUNK = 2**22
BF16_EXPONENT = 0x7F80
NUMBERS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
VIEWS: dict[str, Any] = {**NUMBERS, "U8": np.uint8, "BOOL": np.bool_}
COPY_AGAIN = "copy the folder again, it may be half-written"


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: bytes `start` to `end` of it, row-major. `dtype` is safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """The numbers, memory-mapped, in pieces; bfloat16 as uint16."""
        count = math.prod(self.shape)
        if count:
            numbers = np.memmap(self.file, VIEWS[self.dtype], "r", self.start, (count,))
            for begin in range(0, count, CHUNK):
                yield numbers[begin : begin + CHUNK]

    def is_finite(self) -> bool:
        """Whether the tensor holds neither NaN nor infinity."""
        if self.dtype == "BF16":
            return not any(bool(((piece & BF16_EXPONENT) == BF16_EXPONENT).any()) for piece in self.chunks())
        return all(bool(np.isfinite(piece).all()) for piece in self.chunks())

    def is_mask(self) -> bool:
        """Whether all are zero or one."""
        one = 0x3F80 if self.dtype == "BF16" else 1
        return self.dtype in VIEWS and all(bool(((p == 0) | (p == one)).all()) for p in self.chunks())

    def equals(self, other: Stored) -> bool:
        """Whether both hold the same bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self.chunks(), other.chunks(), strict=True))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, chosen as transformers does: model.safetensors, else those of the index, else all.

    Raises UsageError if there is none, or the index is damaged or names a file that is missing.
    """
    if is_file(folder / SINGLE):
        return [folder / SINGLE]
    index = read_index(folder)
    if index:
        return sorted({folder / shard for shard in index.values()})
    found = sorted(p for p in folder.glob("*.safetensors") if is_file(p))
    if found:
        return found
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"weights must be safetensors, but {folder} only holds {pickles[0]}, which can run code when loaded",
            "convert it once where you trust it: model.save_pretrained(DIR) writes safetensors",
        )
    raise UsageError(f"{folder} holds no *.safetensors file", "name the folder that save_pretrained wrote")


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name by model.safetensors.index.json; empty without one."""
    path = folder / INDEX
    if not is_file(path):
        return {}
    require_readable(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not found or not all(isinstance(shard, str) for shard in found.values()):
            raise ValueError("weight_map must say a file for every tensor")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not a readable index of weights: {error!r}", COPY_AGAIN) from None
    for name, shard in found.items():
        if Path(shard).name != shard:
            raise UsageError(f"{path}: tensor {name} must lie in its own folder, but in {shard!r}", "mend the index")
        if not is_file(folder / shard):
            raise UsageError(f"{path} says that tensor {name} is in {shard}, but there is no such file", COPY_AGAIN)
    return dict(found)


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of `files` by name. Raises UsageError for an incomplete file, a tensor in two files, a false index."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in found:
                raise UsageError(
                    f"tensor {name} is in both {found[name].file} and {file}", "keep the files of one checkpoint only"
                )
            found[name] = tensor
    folder = files[0].parent
    for name, shard in read_index(folder).items() if files[0].name != SINGLE else ():
        if name not in found or found[name].file.name != shard:
            raise UsageError(
                f"{folder / INDEX} says that tensor {name} is in {shard}, but that file has none", COPY_AGAIN
            )
    return found


def _header(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    require_readable(file)
    try:
        size = file.stat().st_size
        if size < MIN_HEADER_BYTES:
            raise UsageError(f"{file} has only {size} bytes", "copy the folder again, it is half-written")
        with safe_open(file, "numpy"):  # checks offsets and length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: Mapping[str, Any] = json.loads(stream.read(length))
    except OSError as error:
        raise unreadable(file, error) from None
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{file} is not a complete safetensors file: {error}", COPY_AGAIN) from None
    data = 8 + length
    return {
        name: Stored(file, t["dtype"], tuple(t["shape"]), *(data + offset for offset in t["data_offsets"]))
        for name, t in header.items()
        if name != "__metadata__"
    }
