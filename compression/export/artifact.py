"""The folder that ships: `onnx/` for the engine, `hf/` for every other runtime, tokenizer, card and checksums.

It is written under a temporary name and renamed when complete, so a folder with its final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import zstandard

from paretune.common.checksums import FACTS, MODEL, write_checksums
from paretune.common.errors import Infeasible
from paretune.common.files import sync_folder
from paretune.compression.export.graph import INLINE_LIMIT_BYTES, build_model, save_model, weight_bytes
from paretune.compression.export.tokenizer import search_settings, write_generation_config, write_tokenizer
from paretune.compression.network.student import (
    EMBEDDING,
    HEAD,
    NO_CODES,
    Codes,
    quantized_weights,
    student_config,
    student_family,
)
from paretune.spaces.candidate import Candidate, Shape
from paretune.teachers.checkpoint.families import TOKEN_KEYS, family_of
from paretune.teachers.checkpoint.layout import to_stored
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.checkpoint.training_state import write_tensors

ZSTD_LEVEL = 3
ZSTD_CHUNK = 1 << 22
HUGGING_FACE = """`hf/` is the same student as a Hugging Face folder; its float32 weights are what the engine computes
with, except that int8 activations are not simulated there."""
NO_HUGGING_FACE = (
    "There is no `hf/` folder, because no standard Hugging Face config expresses layers of different widths."
)


@dataclass(frozen=True)
class ArtifactFacts:
    """Bytes of `onnx/model.onnx` (and its data file), as they are and compressed with zstd level 3."""

    bytes: int
    compressed_bytes: int


def write_artifact(
    folder: Path,
    teacher: Teacher,
    candidate: Candidate,
    weights: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    codes: Codes = NO_CODES,
) -> ArtifactFacts:
    """Write the artifact of `candidate` with `weights` (masked, unquantized). `facts` go into paretune.json.

    `codes` holds those of the matrices whose format needs calibration.

    Raises Infeasible if the graph cannot be built; an older folder of the same name is replaced.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "onnx").mkdir(parents=True)
    try:
        model = _graph(weights, candidate, teacher.config, teacher.shape, codes)
        save_model(model, temporary / MODEL)
        del model  # as large as all weights
        write_tokenizer(teacher, temporary / "onnx")
        write_generation_config(teacher, temporary / "onnx")
        (temporary / "onnx" / "genai_config.json").write_text(
            json.dumps(genai_config(teacher, candidate), indent=1), encoding="utf8"
        )
        # what a standard config can express
        uniform = len({(layer.ffn, layer.kv_groups) for layer in candidate.layers}) == 1
        if uniform:
            _write_hugging_face(temporary / "hf", teacher, candidate, weights, codes)
        sizes = ArtifactFacts(*_sizes(temporary / "onnx"))
        describe_artifact(
            temporary,
            {
                **facts,
                "candidate": json.loads(candidate.to_json()),
                "description": candidate.describe(),
                "teacher": teacher.name,
                "teacher_digest": teacher.digest,
                "bytes": sizes.bytes,
                "compressed_bytes": sizes.compressed_bytes,
                "hugging_face": uniform,
            },
        )
        older = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():  # a complete artifact stays complete until the new one has its place
            folder.replace(older)
        temporary.replace(folder)
        sync_folder(folder.parent)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sizes


def describe_artifact(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add `facts` to paretune.json, write the card from all of them, and renew the checksums."""
    path = folder / FACTS
    told = {**(json.loads(path.read_text(encoding="utf8")) if path.exists() else {}), **facts}
    path.write_text(json.dumps(told, indent=1), encoding="utf8")
    (folder / "README.md").write_text(card(told), encoding="utf8")
    write_checksums(folder)


def compressed_bytes(
    weights: Mapping[str, torch.Tensor],
    candidate: Candidate,
    config: Mapping[str, Any],
    shape: Shape,
    codes: Codes = NO_CODES,
) -> ArtifactFacts:
    """The sizes an artifact of this candidate would have, without writing it. Raises Infeasible like `write_artifact`."""
    model = _graph(weights, candidate, config, shape, codes)
    if weight_bytes(model) < INLINE_LIMIT_BYTES:
        data = memoryview(model.SerializeToString())
        del model
        pieces = (data[start : start + ZSTD_CHUNK] for start in range(0, len(data), ZSTD_CHUNK))
        return ArtifactFacts(len(data), _compressed(pieces))
    return ArtifactFacts(weight_bytes(model), _compressed(tensor.raw_data for tensor in model.graph.initializer))


def _graph(
    weights: Mapping[str, torch.Tensor], candidate: Candidate, config: Mapping[str, Any], shape: Shape, codes: Codes
) -> onnx.ModelProto:
    try:
        return build_model(weights, candidate, config, shape, codes)
    except (ValueError, KeyError, RuntimeError) as error:
        raise Infeasible(f"the graph cannot be built: {error}", "") from error


def genai_config(teacher: Teacher, candidate: Candidate) -> dict[str, Any]:
    """What onnxruntime-genai needs to stream text from `onnx/`; it knows layer-uniform KV heads only."""
    groups = {layer.kv_groups for layer in candidate.layers}
    if len(groups) > 1:
        raise Infeasible(f"onnxruntime-genai needs the same KV groups in every layer, but got {sorted(groups)}", "")
    shape, kv = teacher.shape, candidate.layers[0].kv_groups
    special = teacher.special
    return {
        "model": {
            **({} if special.begin is None else {"bos_token_id": special.begin}),
            "eos_token_id": list(special.stop) if len(special.stop) != 1 else special.stop[0],
            # where none is named, one that a shorter text of a batch may be filled with: it is masked
            "pad_token_id": next((i for i in (special.pad, *special.stop) if i is not None), 0),
            "context_length": teacher.context,
            # to genai the type says what the interface is like, and ours is a Llama's
            "type": "llama" if family_of(shape).gpt2 else family_of(shape).name,
            "vocab_size": shape.vocab,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "intra_op_num_threads": 1,
                    "session.x64quantprecision": "1",  # 8-bit products are exact on CPUs without VNNI too
                    "provider_options": [],
                },
                "filename": "model.onnx",
                "head_size": shape.head_dim,
                "hidden_size": candidate.width(shape),
                "num_attention_heads": kv * shape.heads_per_group,
                "num_key_value_heads": kv,
                "num_hidden_layers": len(candidate.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": search_settings(teacher),
    }


def card(facts: Mapping[str, Any]) -> str:
    """The artifact's README."""
    quality = facts.get("quality_text", "not confirmed")
    return f"""# {facts["teacher"]}, compressed by paretune

{facts["description"]}

- made from `{facts["teacher"]}` (digest {facts["teacher_digest"]})
- `onnx/model.onnx`: {facts["bytes"]:,} bytes, {facts["compressed_bytes"]:,} with zstd
- {quality}
- recovery: {facts.get("recovery_text", "none, the teacher weights themselves")}

`onnx/` runs in ONNX Runtime and onnxruntime-genai: `paretune generate . --prompt "def "`.

```python
import onnxruntime_genai as og

model = og.Model("onnx")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # BOS, where the tokenizer's template adds one
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("def "))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

{HUGGING_FACE if facts.get("hugging_face", True) else NO_HUGGING_FACE}
`SHA256SUMS` is verified whenever paretune loads this folder.
"""


def _write_hugging_face(
    folder: Path, teacher: Teacher, candidate: Candidate, weights: Mapping[str, torch.Tensor], codes: Codes
) -> None:
    folder.mkdir(parents=True)
    effective = quantized_weights(weights, candidate, codes)
    tied = HEAD not in weights and torch.equal(effective[HEAD], effective[EMBEDDING])
    if tied:
        del effective[HEAD]
    (folder / "config.json").write_text(
        json.dumps(_standard_config(teacher, candidate, tied), indent=1, default=str), encoding="utf8"
    )
    stored = {name: value.float() for name, value in to_stored(effective, teacher.shape).items()}
    write_tensors(folder / "model.safetensors", stored, {"format": "pt"})
    write_tokenizer(teacher, folder, slow=True)
    write_generation_config(teacher, folder)


def _standard_config(teacher: Teacher, candidate: Candidate, tied: bool) -> dict[str, Any]:
    """config.json in the words of transformers 5 and of the readers before it: each skips over a key that it does not know."""
    config: dict[str, Any] = student_config(teacher.config, candidate, teacher.shape).to_dict()
    architecture = student_family(candidate, teacher.shape).architecture
    config |= {
        "tie_word_embeddings": tied,
        "architectures": [architecture],
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    config |= {key: teacher.config.get(key) for key in TOKEN_KEYS}
    rope = config.get("rope_parameters")
    if rope:
        config["rope_theta"] = rope["rope_theta"]
        scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
        kind = scaled["rope_type"]
        config["rope_scaling"] = None if kind == "default" else {**scaled, "type": kind}
    return config


def _sizes(folder: Path) -> tuple[int, int]:
    plain = compressed = 0
    for path in sorted(folder.glob("model.onnx*")):
        plain += path.stat().st_size
        with path.open("rb") as stream:
            compressed += _compressed(iter(lambda: stream.read(ZSTD_CHUNK), b""))
    return plain, compressed


def _compressed(pieces: Iterable[bytes | memoryview]) -> int:
    """Bytes of one zstd stream of all `pieces`, which is not kept."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    return sum(len(compressor.compress(piece)) for piece in pieces) + len(compressor.flush())
