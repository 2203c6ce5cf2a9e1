"""Nodes and initializers of a decoder's ONNX graph, one method per part of a decoder; graph.py puts them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper

from paretune.compression.network.student import (
    EMBEDDING,
    HEAD,
    NO_CODES,
    Codes,
    codes_of,
    plain_candidate,
    student_config,
)
from paretune.compression.quantize.grid import Quantized, quantize
from paretune.compression.quantize.half import to_half
from paretune.spaces.candidate import Candidate, Format, Layer, Shape, block_for, shares_table
from paretune.teachers.checkpoint.families import family_of

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
ACCURACY_LEVEL = {"fp32": 0, "int8": 4}
INT8_ZERO, UINT8_ZERO = torch.tensor(0, dtype=torch.int8), torch.tensor(128, dtype=torch.uint8)

Array = npt.NDArray[Any]


class GraphBuilder:
    """Collects nodes and initializers; every method returns the name of the value it makes."""

    def __init__(
        self, epsilon: float, weights: Mapping[str, torch.Tensor] = MappingProxyType({}), codes: Codes = NO_CODES
    ) -> None:
        self.weights, self.codes = weights, codes
        self.model = onnx.ModelProto()  # filled in place: protobuf copies what it is given
        self.nodes = self.model.graph.node
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.epsilon = epsilon
        self.head_inputs: list[str] = []

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node and return the name of its first output, `<name>/output` unless `outputs` are given."""
        outputs = outputs or [f"{name}/output"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: Array | torch.Tensor) -> str:
        """Add an initializer unless there is one of that name, and return the name. bfloat16 stays bfloat16."""
        is_bf16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16  # numpy has none
        if isinstance(value, torch.Tensor):
            array = (value.view(torch.int16) if is_bf16 else value).detach().contiguous().numpy()
        else:
            array = np.ascontiguousarray(value)
        if name not in self.initializers:
            tensor = self.initializers[name] = self.model.graph.initializer.add(name=name, dims=array.shape)
            tensor.data_type = TensorProto.BFLOAT16 if is_bf16 else helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.raw_data = array.tobytes()
        return name

    def lengths(self) -> None:
        """`seqlens_k` (valid keys - 1 per row) and `total_length` from the attention mask, as GroupQueryAttention wants them."""
        axis, one = self.constant("axis_1", np.array([1], np.int64)), self.constant("one", np.array([1], np.int64))
        total = self.node("ReduceSum", ["attention_mask", axis], "/model/mask/sum", keepdims=0)
        self.node(
            "Cast",
            [self.node("Sub", [total, one], "/model/mask/sub")],
            "/model/mask/cast",
            ["seqlens_k"],
            to=TensorProto.INT32,
        )
        size = self.node("Shape", ["attention_mask"], "/model/mask/shape")
        last = self.node(
            "Gather", [size, self.constant("index_1", np.array(1, np.int64))], "/model/mask/gather", axis=0
        )
        self.node("Cast", [last], "/model/mask/cast_total", ["total_length"], to=TensorProto.INT32)

    def rotary(self, config: Mapping[str, Any], shape: Shape) -> None:
        """cos/sin tables [positions, head_dim / 2] from transformers' own rotary module, so every static rope type is right."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rope = LlamaRotaryEmbedding(student_config(config, plain_candidate(shape, shape.layers), shape))
        positions = torch.arange(int(config.get("max_position_embeddings", 2048)), dtype=torch.float32)
        angles = torch.outer(positions, rope.inv_freq.float())
        self.constant("cos_cache", angles.cos() * rope.attention_scaling)
        self.constant("sin_cache", angles.sin() * rope.attention_scaling)

    def norm(self, weight: torch.Tensor, name: str, stream: str, residual: str) -> tuple[str, str]:
        """RMS norm of stream + residual: (normed, their sum)."""
        scale = self.constant(f"{name}.weight", weight.float())
        if not residual:
            return self.node(
                "SimplifiedLayerNormalization", [stream, scale], name, axis=-1, epsilon=self.epsilon, stash_type=1
            ), stream
        outputs = [f"{name}/output", "", "", f"{name}/sum"]
        self.node(
            "SkipSimplifiedLayerNormalization",
            [stream, residual, scale],
            name,
            outputs,
            MICROSOFT,
            epsilon=self.epsilon,
        )
        return outputs[0], outputs[3]

    def product(self, names: list[str], form: Format, name: str, stream: str, bias: torch.Tensor | None = None) -> str:
        """stream @ W.T + bias with the rows of the weights `names`, one below the other, and their own codes.

        Raises ValueError with the op and its path where a weight is missing or cannot be quantized.
        """
        try:
            return self._product(names, form, name, stream, bias)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{'MatMul' if form.bits == 32 else 'MatMulNBits'} at {name}: {error}") from error

    def _product(self, names: list[str], form: Format, name: str, stream: str, bias: torch.Tensor | None) -> str:
        parts = {n: self.weights[n] for n in names}
        weight, whole = torch.cat(list(parts.values())), None
        if form.is_integer:
            found = [codes_of(n, part, form, self.codes) for n, part in parts.items()]
            codes, scales = torch.cat([q.codes for q in found]), torch.cat([q.scales for q in found])
            whole = replace(found[0], codes=codes, scales=scales)
        return self.matmul(weight, form, name, stream, bias, whole)

    def matmul(
        self,
        weight: torch.Tensor,
        form: Format,
        name: str,
        stream: str,
        bias: torch.Tensor | None = None,
        codes: Quantized | None = None,
    ) -> str:
        """stream @ weight.T + bias with the weight [N, K] in `form`, rounded to nearest unless `codes` are given."""
        if not form.is_integer:
            table = self.floating(f"{name}.weight", weight.t(), form, f"{name}/widen")
            product = self.node("MatMul", [stream, table], name)
        else:
            q = quantize(weight, form) if codes is None else codes
            product = self.integer_product(q, form, name, f"{name}.weight", stream)
        if bias is None:
            return product
        return self.node("Add", [product, self.constant(f"{name}.bias", bias.float())], f"{name}/add")

    def floating(self, name: str, weight: torch.Tensor, form: Format, path: str) -> str:
        """A constant in fp32, fp16 or bf16, as fp32."""
        if form.bits == 32:
            return self.constant(name, weight.float())
        return self.node("Cast", [self.constant(name, to_half(weight, form.half))], path, to=TensorProto.FLOAT)

    def integer_product(
        self, q: Quantized, form: Format, name: str, table: str, stream: str, outputs: list[str] | None = None
    ) -> str:
        """stream @ W.T with the weights `q`, stored as `table`, by the kernel of their activations."""
        if not form.is_per_tensor:
            return self.matmul_nbits(self.packed(q, table), q.codes.shape, form, name, stream, outputs)
        weight = [self.constant(table, q.codes.t()), self.constant(f"{table}.scales", q.scales.flatten())]
        if form.activation == "dynamic":
            return self.dynamic_product(weight, name, stream, outputs)
        grid = [self.constant(f"{name}/scale", torch.tensor(q.input_scale)), self.constant("uint8_zero", UINT8_ZERO)]
        rounded = self.node("QuantizeLinear", [stream, *grid], f"{name}/round")
        factors = [
            self.node("DequantizeLinear", [rounded, *grid], f"{name}/activations"),
            self.node("DequantizeLinear", weight, f"{name}/widen", axis=1),
        ]
        return self.node("MatMul", factors, name, outputs)

    def dynamic_product(self, weight: list[str], name: str, stream: str, outputs: list[str] | None) -> str:
        """stream @ W.T with int8 weights [K, N] and their scales [N], activations rounded by their own range."""
        x, scale, point = f"{name}/activations", f"{name}/activations/scale", f"{name}/activations/zero"
        self.node("DynamicQuantizeLinear", [stream], f"{name}/round", [x, scale, point])
        zero = self.constant(
            f"{name}/zero", INT8_ZERO
        )  # of its own: ONNX Runtime fails where it makes a shared one uint8
        sums = self.node("MatMulInteger", [x, weight[0], point, zero], name)
        real = self.node("Cast", [sums], f"{name}/cast", to=TensorProto.FLOAT)
        return self.node("Mul", [real, self.node("Mul", [scale, weight[1]], f"{name}/scale")], f"{name}/real", outputs)

    def packed(self, q: Quantized, name: str) -> list[str]:
        """The constants of MatMulNBits and GatherBlockQuantized; a scale per row is repeated for each of the row's blocks."""
        block = block_for(q.group_size, q.codes.shape[1], q.bits)
        scales = q.scales.repeat_interleave(q.group_size // block, 1)
        return [self.constant(name, pack(q)), self.constant(f"{name}.scales", scales)]

    def matmul_nbits(
        self,
        inputs: list[str],
        size: torch.Size,
        form: Format,
        name: str,
        stream: str,
        outputs: list[str] | None = None,
    ) -> str:
        """stream @ W.T by ONNX Runtime's MatMulNBits; W has the `size` [N, K], `inputs` are its codes and scales."""
        return self.node(
            "MatMulNBits",
            [stream, *inputs],
            name,
            outputs,
            MICROSOFT,
            N=size[0],
            K=size[1],
            bits=form.bits,
            block_size=block_for(form.group_size, size[1], form.bits),
            accuracy_level=ACCURACY_LEVEL[form.activation],
        )

    def heads(self, i: int, layer: Layer, shape: Shape, normed: str) -> list[str]:
        """Query, key and value of GroupQueryAttention: one packed matrix, split only where heads are normed one by one."""
        family, prefix, path = family_of(shape), f"model.layers.{i}.self_attn.", f"/model/layers.{i}/attn"
        biases = [f"{prefix}{p}_proj.bias" for p in "qkv"] if family.qkv_bias or family.gpt2 else []
        bias = torch.cat([self.weights[name] for name in biases]) if biases else None
        names = [f"{prefix}{p}_proj.weight" for p in "qkv"]
        packed = self.product(names, layer.attention_format, f"{path}/qkv_proj", normed, bias)
        if not family.qk_norm:
            return [packed, "", ""]
        kv = layer.kv_groups * shape.head_dim
        widths = [kv * shape.heads_per_group, kv, kv]
        q, k, v = (f"{path}/split/{p}" for p in "qkv")
        table = self.constant(f"{path}/split.widths", np.array(widths, np.int64))
        self.node("Split", [packed, table], f"{path}/split", [q, k, v], axis=-1)
        return [
            self.head_norm(self.weights[f"{prefix}q_norm.weight"], f"{path}/q_norm", q, widths[0]),
            self.head_norm(self.weights[f"{prefix}k_norm.weight"], f"{path}/k_norm", k, widths[1]),
            v,
        ]

    def head_norm(self, weight: torch.Tensor, name: str, stream: str, width: int) -> str:
        """RMS norm over every head of stream [batch, length, width], `weight` [head_dim] shared by all."""
        one_head = self.constant("one_head", np.array([0, -1, weight.shape[0]], np.int64))
        all_heads = self.constant(f"{name}.heads", np.array([0, -1, width], np.int64))
        normed, _ = self.norm(weight, name, self.node("Reshape", [stream, one_head], f"{name}/split"), "")
        return self.node("Reshape", [normed, all_heads], f"{name}/join")

    def attention(self, i: int, qkv: list[str], layer: Layer, shape: Shape) -> str:
        """Append layer `i`'s GroupQueryAttention with its KV cache.

        Returns the output [batch, sequence, heads * head_dim]. Positions are rotary unless the shape has learned ones.
        """
        path, rotary = f"/model/layers.{i}/attn/gqa", not shape.positions
        inputs = [
            *qkv,
            f"past_key_values.{i}.key",
            f"past_key_values.{i}.value",
            "seqlens_k",
            "total_length",
            *(["cos_cache", "sin_cache"] if rotary else []),
        ]
        return self.node(
            "GroupQueryAttention",
            inputs,
            path,
            [f"{path}/output", f"present.{i}.key", f"present.{i}.value"],
            MICROSOFT,
            num_heads=layer.kv_groups * shape.heads_per_group,
            kv_num_heads=layer.kv_groups,
            scale=shape.head_dim**-0.5,
            do_rotary=int(rotary),
            rotary_interleaved=0,
        )

    def embedding_and_head(self, candidate: Candidate) -> str:
        """Make both tables, one of them where embedding and head are tied and have one format; returns the embedded tokens."""
        embedding, form = self.weights[EMBEDDING], candidate.embedding_format
        head = self.weights.get(HEAD, embedding)
        head_format = candidate.head_format
        shared = HEAD not in self.weights and shares_table(head_format, form) and head_format.algorithm == "rtn"
        if not form.is_integer:
            table = self.constant("embedding", embedding.float() if form.bits == 32 else to_half(embedding, form.half))
            stream = self.node("Gather", [table, "input_ids"], "/model/embed_tokens", axis=0)
            if form.bits == 16:
                stream = self.node("Cast", [stream], "/model/embed_tokens/widen", to=TensorProto.FLOAT)
        else:
            tables = self.packed(quantize(embedding, form), "embedding")
            rows = np.array([embedding.shape[0], -1], np.int64)
            flat = self.node("Reshape", [tables[0], self.constant("embedding_rows", rows)], "/model/embed_tokens/flat")
            stream = self.node(
                "GatherBlockQuantized",
                [flat, "input_ids", tables[1]],
                "/model/embed_tokens",
                domain=MICROSOFT,
                bits=form.bits,
                block_size=block_for(form.group_size, embedding.shape[1], form.bits),
                gather_axis=0,
                quantize_axis=1,
            )
        if not head_format.is_integer:
            table = self.floating("embedding" if shared else "lm_head", head, head_format, "/lm_head/widen")
            self.head_inputs = [self.node("Transpose", [table], "/lm_head/transpose", perm=[1, 0])]
        else:
            self.head_codes = codes_of(HEAD, head, head_format, self.codes)
            self.head_inputs = ["embedding", "embedding.scales"] if shared else []
        return stream

    def head(self, form: Format, normed: str) -> None:
        """Append the product with the head's table; it writes the output `logits` [batch, sequence, vocab]."""
        if not form.is_integer:
            self.node("MatMul", [normed, *self.head_inputs], "/lm_head", ["logits"])
        elif self.head_inputs:
            self.matmul_nbits(self.head_inputs, self.head_codes.codes.shape, form, "/lm_head", normed, ["logits"])
        else:
            self.integer_product(self.head_codes, form, "/lm_head", "lm_head", normed, ["logits"])

    def finish(self, candidate: Candidate, shape: Shape) -> onnx.ModelProto:
        """Declare the inputs, outputs and opsets that `build_model` documents, and return the model."""
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", shape.vocab])]
        for i, layer in enumerate(candidate.layers):
            for kind in ("key", "value"):
                inputs.append(
                    helper.make_tensor_value_info(
                        f"past_key_values.{i}.{kind}",
                        TensorProto.FLOAT,
                        ["batch", layer.kv_groups, "past", shape.head_dim],
                    )
                )
                outputs.append(
                    helper.make_tensor_value_info(
                        f"present.{i}.{kind}", TensorProto.FLOAT, ["batch", layer.kv_groups, "total", shape.head_dim]
                    )
                )
        self.model.graph.name, self.model.producer_name, self.model.ir_version = "paretune", "paretune", IR_VERSION
        self.model.graph.input.extend(inputs)
        self.model.graph.output.extend(outputs)
        self.model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)])
        return self.model


def pack(q: Quantized) -> Array:
    """MatMulNBits layout: uint8 [N, blocks, block * bits / 8], codes shifted by the implied zero point, lowest bits first."""
    n, k = q.codes.shape
    block, per_byte = block_for(q.group_size, k, q.bits), 8 // q.bits
    shifted = (q.codes.to(torch.int16) + 2 ** (q.bits - 1)).to(torch.uint8).view(n, k // block, block)
    packed = shifted[..., 0::per_byte].clone()
    for i in range(1, per_byte):
        packed |= shifted[..., i::per_byte] << (q.bits * i)
    return np.asarray(packed.contiguous().numpy())
