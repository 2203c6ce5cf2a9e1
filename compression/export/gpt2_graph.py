"""What GPT-2's graph has that a Llama's has not: LayerNorm, biases, learned positions, an FFN of two matrices and GELU.

Attention is the same GroupQueryAttention without rotary embedding, so the KV cache and the engine's worker are the same too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paretune.spaces.candidate import Candidate, Format, Shape
from paretune.teachers.checkpoint.families import POSITIONS

if TYPE_CHECKING:
    from paretune.compression.export.graph_builder import GraphBuilder

MICROSOFT = "com.microsoft"


def gpt2_decoder(graph: GraphBuilder, candidate: Candidate, shape: Shape) -> str:
    """Everything between the token ids and the head; returns the normed stream."""
    stream, residual = _positions(graph, graph.embedding_and_head(candidate)), ""
    for i, layer in enumerate(candidate.layers):
        prefix, path = f"model.layers.{i}.", f"/model/layers.{i}"
        normed, residual = _norm(graph, f"{prefix}input_layernorm", f"{path}/input_layernorm", stream, residual)
        attended = graph.attention(i, graph.heads(i, layer, shape, normed), layer, shape)
        o_proj = f"{prefix}self_attn.o_proj"
        stream = _linear(graph, o_proj, layer.attention_format, f"{path}/attn/o_proj", attended)
        after = f"{prefix}post_attention_layernorm"
        normed, residual = _norm(graph, after, f"{path}/post_attention_layernorm", stream, residual)
        inner = _linear(graph, f"{prefix}mlp.up_proj", layer.ffn_format, f"{path}/mlp/up_proj", normed)
        inner = graph.node("Gelu", [inner], f"{path}/mlp/gelu", approximate="tanh")
        stream = _linear(graph, f"{prefix}mlp.down_proj", layer.ffn_format, f"{path}/mlp/down_proj", inner)
    return _norm(graph, "model.norm", "/model/norm", stream, residual)[0]


def _positions(graph: GraphBuilder, embedded: str) -> str:
    """Add the embedding of every token's position: how many valid tokens the attention mask has before it."""
    path = "/model/positions"
    axis, one = graph.constant("axis_1", np.array([1], np.int64)), graph.constant("one", np.array([1], np.int64))
    column = graph.constant("index_1", np.array(1, np.int64))
    counted = graph.node("CumSum", ["attention_mask", column], f"{path}/count")
    before = graph.node("Sub", [counted, one], f"{path}/before")
    zero = graph.constant("zero", np.array([0], np.int64))
    valid = graph.node("Max", [before, zero], f"{path}/valid")  # padding on the left counts none
    total = graph.node("Shape", ["attention_mask"], f"{path}/total", start=1, end=2)
    new = graph.node("Shape", ["input_ids"], f"{path}/new", start=1, end=2)
    first = graph.node("Sub", [total, new], f"{path}/first")
    own = graph.node("Slice", [valid, first, total, axis], f"{path}/own")
    table = graph.constant("positions", graph.weights[POSITIONS].float())
    return graph.node("Add", [embedded, graph.node("Gather", [table, own], f"{path}/rows", axis=0)], f"{path}/add")


def _linear(graph: GraphBuilder, tensor: str, form: Format, path: str, stream: str) -> str:
    return graph.product([f"{tensor}.weight"], form, path, stream, graph.weights[f"{tensor}.bias"])


def _norm(graph: GraphBuilder, tensor: str, path: str, stream: str, residual: str) -> tuple[str, str]:
    """LayerNorm of stream + residual: (normed, their sum)."""
    scale = graph.constant(f"{path}.weight", graph.weights[f"{tensor}.weight"].float())
    bias = graph.constant(f"{path}.bias", graph.weights[f"{tensor}.bias"].float())
    if not residual:
        return graph.node("LayerNormalization", [stream, scale, bias], path, axis=-1, epsilon=graph.epsilon), stream
    outputs = [f"{path}/output", "", "", f"{path}/sum"]
    inputs = [stream, residual, scale, bias]
    graph.node("SkipLayerNormalization", inputs, path, outputs, MICROSOFT, epsilon=graph.epsilon)
    return outputs[0], outputs[3]
