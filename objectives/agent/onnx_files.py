"""Which files outside itself an ONNX model names, read from its protobuf encoding alone: an agent needs no `onnx` package.

The parser of the engine is not asked, because it would open those files. Field numbers are those of onnx.proto
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); the weights themselves are stepped over, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# Message to its fields that lead to tensors, and the message that each holds.
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def external_locations(path: Path) -> set[str]:
    """The `location` of every tensor whose data are outside the file. Raises ValueError where this is no protobuf message."""
    if path.stat().st_size == 0:
        raise ValueError("the model is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return set(_locations(data))


def _locations(data: mmap.mmap) -> Iterator[str]:
    todo = [("model", 0, len(data))]
    while todo:
        message, start, end = todo.pop()
        entry: dict[int, bytes] = {}
        for field, begin, stop in _fields(data, start, end):
            inner = FIELDS[message].get(field)
            if inner is not None:
                todo.append((inner, begin, stop))
            elif message == "entry":
                entry[field] = data[begin:stop]
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf8", "replace")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last+1 position of every length-delimited field between `at` and `end`."""
    while at < end:
        key, at = _varint(data, at, end)
        if key >> 32:  # other readers cut a tag to 32 bits, and would see another field than we do
            raise ValueError(f"byte {at} begins no protobuf field")
        kind = key & 7
        if kind == VARINT:
            _, at = _varint(data, at, end)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise ValueError(f"a field at byte {at} says that it is longer than the message")
            yield key >> 3, at, at + length
            at += length
        else:
            raise ValueError(f"byte {at} begins no protobuf field")
    if at > end:
        raise ValueError("a field ends behind its message")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} ends no protobuf number")
