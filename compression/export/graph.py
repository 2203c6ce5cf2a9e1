"""The ONNX graph of a student, written node by node with its weights in the engine's own quantized form.

The interface and node choice follow the graphs of the onnxruntime-genai builder (packed QKV into GroupQueryAttention with
rotary embedding inside, SkipSimplifiedLayerNormalization), so its runtime streams text from the file; a test holds what it
streams against transformers. Written here because every layer carries its own widths and formats, and because a graph with
weights takes milliseconds. Quantized matrices are MatMulNBits (half the load time of DequantizeLinear, which ONNX Runtime would
fuse into it anyway); a quantized embedding is GatherBlockQuantized, shared with the head when both have one format. 16-bit
weights pass a Cast; one scale for all activations is MatMulInteger (dynamic) or QDQ (static), in standard operators. Norms
of q and k come between the packed matrix and GroupQueryAttention: its own inputs for them have no CPU kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from paretune.compression.export.gpt2_graph import gpt2_decoder
from paretune.compression.export.graph_builder import GraphBuilder
from paretune.compression.network.student import NO_CODES, Codes
from paretune.spaces.candidate import Candidate, Shape
from paretune.teachers.checkpoint.families import family_of

INLINE_LIMIT_BYTES = 1_500_000_000


def build_model(
    weights: Mapping[str, torch.Tensor],
    candidate: Candidate,
    config: Mapping[str, Any],
    shape: Shape,
    codes: Codes = NO_CODES,
) -> onnx.ModelProto:
    """The decoder of `candidate` with `weights` (unquantized, already masked; Hugging Face names, [out, in]).

    `codes` holds those of the matrices whose format needs calibration. Raises ValueError if some are missing.

    Inputs: input_ids [batch, sequence], attention_mask [batch, past + sequence] (int64), past_key_values.<i>.key/.value
    [batch, kv_heads, past, head_dim]. Outputs: logits [batch, sequence, vocab], present.<i>.key/.value.
    """
    graph = GraphBuilder(float(config.get("rms_norm_eps", 1e-6)), weights, codes)
    graph.lengths()
    if family_of(shape).gpt2:
        normed = gpt2_decoder(graph, candidate, shape)
        graph.head(candidate.head_format, normed)
        return graph.finish(candidate, shape)
    graph.rotary(config, shape)
    stream = graph.embedding_and_head(candidate)
    residual = ""
    for i, layer in enumerate(candidate.layers):
        prefix, path = f"model.layers.{i}.", f"/model/layers.{i}"
        normed, residual = graph.norm(
            weights[f"{prefix}input_layernorm.weight"], f"{path}/input_layernorm", stream, residual
        )
        attended = graph.attention(i, graph.heads(i, layer, shape, normed), layer, shape)
        o = [f"{prefix}self_attn.o_proj.weight"]
        stream = graph.product(o, layer.attention_format, f"{path}/attn/o_proj", attended)
        normed, residual = graph.norm(
            weights[f"{prefix}post_attention_layernorm.weight"], f"{path}/post_attention_layernorm", stream, residual
        )
        gate, up = (
            graph.product([f"{prefix}mlp.{p}_proj.weight"], layer.ffn_format, f"{path}/mlp/{p}_proj", normed)
            for p in ("gate", "up")
        )
        gated = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{path}/mlp/sigmoid")], f"{path}/mlp/silu")
        product = graph.node("Mul", [gated, up], f"{path}/mlp/product")
        down = [f"{prefix}mlp.down_proj.weight"]
        stream = graph.product(down, layer.ffn_format, f"{path}/mlp/down_proj", product)
    normed, _ = graph.norm(weights["model.norm.weight"], "/model/norm", stream, residual)
    graph.head(candidate.head_format, normed)
    return graph.finish(candidate, shape)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write the model, weights inside the file while protobuf's 2 GB limit allows, else in `<name>.data` beside it."""
    if weight_bytes(model) < INLINE_LIMIT_BYTES:  # ByteSize() itself fails above 2 GB
        path.write_bytes(model.SerializeToString())
    else:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # onnx would append to it
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data")


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
