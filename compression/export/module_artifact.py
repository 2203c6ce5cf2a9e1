"""The folder that ships for a plug-in's module: `onnx/` for the engine, `torch/` with the same weights, card and checksums."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
import zstandard

from paretune.common.checksums import FACTS, MODEL, write_checksums
from paretune.compression.export.artifact import ZSTD_LEVEL, ArtifactFacts
from paretune.compression.export.graph import save_model

WEIGHTS = Path("torch") / "model.safetensors"


def module_bytes(model: onnx.ModelProto) -> ArtifactFacts:
    """The sizes that `onnx/model.onnx` would have."""
    data = model.SerializeToString()
    return ArtifactFacts(len(data), len(zstandard.compress(data, ZSTD_LEVEL)))


def write_module_artifact(
    folder: Path, model: onnx.ModelProto, effective: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> ArtifactFacts:
    """Write the artifact under a temporary name and rename it; an older folder of the same name is replaced.

    `effective` are the float weights that the engine computes with, by the plug-in's own names.
    """
    from safetensors.torch import save_file

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / MODEL.parent).mkdir(parents=True)
    (temporary / WEIGHTS.parent).mkdir()
    try:
        save_model(model, temporary / MODEL)
        save_file({name: value.detach().contiguous() for name, value in effective.items()}, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(0o644)
        sizes = module_bytes(model)
        describe_module(temporary, {**facts, "bytes": sizes.bytes, "compressed_bytes": sizes.compressed_bytes})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sizes


def describe_module(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add `facts` to paretune.json, write the card from all of them, and renew the checksums."""
    path = folder / FACTS
    told = {**(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}), **facts}
    path.write_text(json.dumps(told, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(_card(told), encoding="utf-8")
    write_checksums(folder)


def _card(facts: Mapping[str, Any]) -> str:
    return f"""# {facts["teacher"]}, compressed by paretune

{facts["description"]}

- made from the plug-in `{facts["teacher"]}` (digest {facts["teacher_digest"]})
- `onnx/model.onnx`: {facts["bytes"]:,} bytes, {facts["compressed_bytes"]:,} with zstd
- {facts.get("quality_text", "not confirmed")}
- recovery: {facts.get("recovery_text", "none, the teacher's own weights")}

`onnx/` runs in ONNX Runtime at the input shapes {facts.get("inputs", "of the plug-in's batches")}. Open it with the session option
`session.qdq_matmulnbits_accuracy_level` = `0`, as it was scored; ONNX Runtime's own choice rounds the inputs of 4-bit
matrices to 8 bits. `torch/model.safetensors` holds the float weights that the engine computes with, for the plug-in's own
module. `SHA256SUMS` is verified whenever paretune loads this folder.
"""
