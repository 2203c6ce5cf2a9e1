"""The model families that can be teachers, in one table: their transformers classes and the tensors of a layer.

Whatever knows the name of a layer's tensor reads it here: the check of a checkpoint, sorting and slicing, the network in
torch, the ONNX graph, the exported folder. A tensor is described by the axes of its shape, so a bias or a norm is cut
together with the matrix it belongs to without code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from paretune.spaces.candidate import Shape

Axis = Literal["hidden", "ffn", "query", "kv", "head"]
"""`query` is heads x head_dim, `kv` is KV heads x head_dim, `head` is one head_dim."""
CUT_AXES: tuple[Axis, ...] = ("ffn", "query", "kv", "hidden")
"""The axes that sorting permutes and slicing shortens."""

Tensors = Mapping[str, tuple[Axis, ...]]
COMMON: Tensors = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
}
QKV_BIASES: Tensors = {
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
}
QK_NORMS: Tensors = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}


@dataclass(frozen=True)
class Family:
    """`name` is transformers' model_type and onnxruntime-genai's type; `classes` begins the names of transformers' classes.

    `defaults` is what transformers assumes for keys that config.json lacks, as far as it decides shapes or attention;
    `full_attention` are the settings that switch a sliding window off. `odd_heads_as` names the family that computes the
    same network where this one's config refuses a hidden size that is no multiple of the number of heads.
    """

    name: str
    classes: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    full_attention: Mapping[str, Any] = field(default_factory=dict)
    odd_heads_as: str = ""

    @property
    def layer_tensors(self) -> Tensors:
        """Names below `model.layers.<i>.` with the axes of their shapes."""
        return {**COMMON, **(QKV_BIASES if self.qkv_bias else {}), **(QK_NORMS if self.qk_norm else {})}

    @property
    def architecture(self) -> str:
        return f"{self.classes}ForCausalLM"

    @property
    def config_class(self) -> Any:
        import transformers

        return getattr(transformers, f"{self.classes}Config")

    @property
    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.architecture)


_NO_WINDOW = {"sliding_window": None}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama", defaults={"max_position_embeddings": 2048}, odd_heads_as="mistral"),
        Family(
            "mistral",
            "Mistral",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            full_attention=_NO_WINDOW,
        ),
        Family(
            "qwen2", "Qwen2", qkv_bias=True, defaults=_QWEN, full_attention={"use_sliding_window": False, **_NO_WINDOW}
        ),
        Family(
            "qwen3",
            "Qwen3",
            qk_norm=True,
            defaults={**_QWEN, "head_dim": 128},
            full_attention={"use_sliding_window": False, **_NO_WINDOW},
        ),
    )
}


def family_of(shape: Shape) -> Family:
    """The family of a teacher or student of this shape."""
    return FAMILIES[shape.family]


def standard_family(shape: Shape, heads: int, hidden: int = 0) -> Family:
    """The family whose transformers config accepts `heads` query heads: the shape's own, or the one that stands in for it."""
    family = family_of(shape)
    return FAMILIES[family.odd_heads_as] if family.odd_heads_as and (hidden or shape.hidden) % heads else family


def axis_sizes(shape: Shape, ffn: int, kv_heads: int, hidden: int = 0) -> dict[Axis, int]:
    """Length of every axis in a layer of `ffn` neurons, `kv_heads` KV heads and a residual stream of `hidden` (0: its own)."""
    kv = kv_heads * shape.head_dim
    return {
        "hidden": hidden or shape.hidden,
        "ffn": ffn,
        "query": kv * shape.heads_per_group,
        "kv": kv,
        "head": shape.head_dim,
    }
