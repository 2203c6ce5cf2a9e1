"""The model families that can be teachers, in one table: their transformers classes and the tensors of a layer.

Whatever knows the name of a layer's tensor reads it here: the check of a checkpoint, sorting and slicing, the network in
torch, the ONNX graph, the exported folder. A tensor is described by the axes of its shape, so a bias or a norm is cut
together with the matrix it belongs to without code of its own.

All names are those of a Llama with matrices [out, in]; a family that stores its tensors otherwise (GPT-2) is translated when
they are read and when they are written (layout.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from paretune.spaces.candidate import Shape

Axis = Literal["hidden", "ffn", "query", "kv", "head", "vocab", "positions"]
"""`query` is heads x head_dim, `kv` is KV heads x head_dim, `head` is one head_dim; `positions` are learned ones."""
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
ALL_BIASES: Tensors = {
    **QKV_BIASES,
    "input_layernorm.bias": ("hidden",),
    "self_attn.o_proj.bias": ("hidden",),
    "post_attention_layernorm.bias": ("hidden",),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.bias": ("hidden",),
}
GATE = "mlp.gate_proj.weight"
ROOT: Tensors = {"model.embed_tokens.weight": ("vocab", "hidden"), "model.norm.weight": ("hidden",)}
POSITIONS = "model.positions.weight"
ROOT_OF_GPT2: Tensors = {POSITIONS: ("positions", "hidden"), "model.norm.bias": ("hidden",)}
HEAD: Tensors = {"lm_head.weight": ("vocab", "hidden")}
QK_NORMS: Tensors = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Family:
    """`name` is transformers' model_type and onnxruntime-genai's type; `classes` begins the names of transformers' classes.

    `defaults` is what transformers assumes for keys that config.json lacks, as far as it decides shapes or attention;
    `full_attention` are the settings that switch a sliding window off. `odd_heads_as` names the family that computes the
    same network where this one's config refuses a hidden size that is no multiple of the number of heads.

    `keys` are those of config.json that are read beside LLAMA_KEYS (GPT-2: beside its defaults); no other key of the file
    reaches transformers. `refused` are
    keys that ask for a network that is not built here, with the values that change nothing.

    `gpt2` says all that sets GPT-2 apart: LayerNorm and biases everywhere, learned positions instead of rotary ones, an FFN
    without gate, tensors stored in a layout of its own. `own_keys` are its names for keys of config.json.
    """

    name: str
    classes: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    full_attention: Mapping[str, Any] = field(default_factory=dict)
    odd_heads_as: str = ""
    gpt2: bool = False
    own_keys: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def network_keys(self) -> frozenset[str]:
        """The keys of config.json that are read: the network's sizes and constants, and its special tokens."""
        own = ("tie_word_embeddings", *self.defaults) if self.gpt2 else LLAMA_KEYS
        return frozenset((*TOKEN_KEYS, *own, *self.keys))

    @property
    def layer_tensors(self) -> Tensors:
        """Names below `model.layers.<i>.` with the axes of their shapes."""
        if self.gpt2:
            return {name: axes for name, axes in COMMON.items() if name != GATE} | dict(ALL_BIASES)
        return {**COMMON, **(QKV_BIASES if self.qkv_bias else {}), **(QK_NORMS if self.qk_norm else {})}

    @property
    def root_tensors(self) -> Tensors:
        """Names of what is in no layer, without the head."""
        return {**ROOT, **(ROOT_OF_GPT2 if self.gpt2 else {})}

    @property
    def architecture(self) -> str:
        """Name of the transformers class of the whole model, as `architectures` in config.json lists it."""
        return f"{self.classes}{'LMHeadModel' if self.gpt2 else 'ForCausalLM'}"

    @property
    def config_class(self) -> Any:
        """The transformers class of the config; transformers is imported when this is asked for."""
        import transformers

        return getattr(transformers, f"{self.classes}Config")

    @property
    def model_class(self) -> Any:
        """The transformers class of the whole model; transformers is imported when this is asked for."""
        import transformers

        return getattr(transformers, self.architecture)


_NO_WINDOW = {"sliding_window": None}
_WINDOW_KEYS = ("sliding_window", "use_sliding_window")
_NO_BIAS: Mapping[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_GPT2 = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama", defaults={"max_position_embeddings": 2048}, odd_heads_as="mistral", refused=_NO_BIAS),
        Family(
            "mistral",
            "Mistral",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            full_attention=_NO_WINDOW,
            keys=_WINDOW_KEYS,
            refused=_NO_BIAS,
        ),
        Family(
            "qwen2",
            "Qwen2",
            qkv_bias=True,
            defaults=_QWEN,
            full_attention={"use_sliding_window": False, **_NO_WINDOW},
            keys=_WINDOW_KEYS,
            refused=_NO_BIAS,
        ),
        Family(
            "qwen3",
            "Qwen3",
            qk_norm=True,
            defaults={**_QWEN, "head_dim": 128},
            full_attention={"use_sliding_window": False, **_NO_WINDOW},
            keys=_WINDOW_KEYS,
            refused=_NO_BIAS,
        ),
        Family("gpt2", "GPT2", defaults=_GPT2, gpt2=True, own_keys=_GPT2_KEYS),
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
        "vocab": shape.vocab,
        "positions": shape.positions,
    }
