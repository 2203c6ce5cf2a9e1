"""config.json of a teacher: read without handing control to anything it names, checked key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paretune.common.errors import UsageError
from paretune.common.file_access import is_file, unreadable
from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.families import FAMILIES, Family

STATIC_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Rotary embeddings whose tables do not depend on the text, with the numbers that each needs."""
LAYER_TYPES = ("full_attention", "sliding_attention")
OTHER_NETWORK_REMEDY = "choose an unquantized checkpoint with no biases but those that are standard in its family"
# Keys that ask for another network, with the values that change nothing; so does what is false, null or empty.
OTHER_NETWORKS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "pruned_heads": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "num_local_experts": (1,),
    "num_experts": (1,),
    "n_routed_experts": (),
}
NEEDED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of a supported family without the keys that could name code, and with the family's defaults.

    Raises UsageError.
    """
    if not is_file(path):
        raise UsageError(f"{path.parent} has no file config.json", "name a complete Hugging Face folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not readable JSON: {error}", "copy the folder again, it may be half-written"
        ) from None
    name = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UsageError(
            f"the model family must be one of {sorted(FAMILIES)}, but {path} says model_type={name!r}",
            "choose a supported checkpoint",
        )
    family = FAMILIES[name]
    _refuse_other_networks(config, family, path)
    config = {key: value for key, value in {**family.defaults, **config}.items() if key in family.network_keys}
    config["model_type"] = name
    config |= {key: config.get(own) for key, own in family.own_keys.items()}
    if family.gpt2:
        _check_gpt2(config, path)
    else:
        if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise UsageError(
                f"{path}: hidden_act must be 'silu', but is {config['hidden_act']!r}", "choose a supported checkpoint"
            )
        _unite_rope(config, path)
    _check_positive(config, path)
    return config


def _refuse_other_networks(config: dict[str, Any], family: Family, path: Path) -> None:
    """Refuse keys that ask for another network than the family's, unless their value changes nothing."""
    for key, neutral in {**OTHER_NETWORKS, **family.refused}.items():
        value = config.get(key)
        if value and not any(value == wanted and type(value) is type(wanted) for wanted in neutral):
            wanted = " or ".join(map(repr, neutral)) or "absent"
            raise UsageError(f"{path}: {key} must be {wanted}, but is {value!r}", OTHER_NETWORK_REMEDY)
    kinds = config.get("layer_types")
    other = {str(kind) for kind in kinds if kind not in LAYER_TYPES} if isinstance(kinds, list) else set()
    if other:
        raise UsageError(
            f"{path}: layer_types must be {' or '.join(map(repr, LAYER_TYPES))}, but has {', '.join(sorted(other))}",
            "choose a supported checkpoint",
        )


def _unite_rope(config: dict[str, Any], path: Path) -> None:
    """Check the rotary embedding, and keep it as `rope_parameters` whichever of its spellings a config has.

    transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`.
    """
    old, new, theta = (config.pop(key, None) for key in ("rope_scaling", "rope_parameters", "rope_theta"))
    found: dict[str, Any] = {}
    for key, given in (("rope_scaling", old), ("rope_parameters", new)):
        if given and not isinstance(given, dict):
            raise UsageError(f"{path}: {key} must be an object, but is {given!r}", "mend config.json")
        for name, value in (given or {}).items():
            name = "rope_type" if name == "type" else name
            if value is not None and found.setdefault(name, value) != value:
                raise UsageError(
                    f"{path}: rope_scaling and rope_parameters must agree, but say {name}={found[name]!r} and {value!r}",
                    "remove the one that is wrong",
                )
    if theta is not None and found.setdefault("rope_theta", theta) != theta:
        raise UsageError(
            f"{path}: rope_theta must be the same everywhere, but is {theta!r} and {found['rope_theta']!r}",
            "remove the one that is wrong",
        )
    kind = found.setdefault("rope_type", "default")
    if not isinstance(kind, str) or kind not in STATIC_ROPE:
        raise UsageError(
            f"{path}: rope_type must be one of {sorted(STATIC_ROPE)}, but is {kind!r}", "choose a supported checkpoint"
        )
    if found.pop("partial_rotary_factor", 1) != 1:
        raise UsageError(
            f"{path}: partial_rotary_factor must be 1: the whole head is rotated here", "choose a supported checkpoint"
        )
    if kind == "llama3":
        found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    for name in ("rope_theta",) * ("rope_theta" in found) + STATIC_ROPE[kind]:
        if not _is_positive(found.get(name)):
            raise UsageError(
                f"{path}: {name} of the {kind} rotary embedding must be a positive number, but is {found.get(name)!r}",
                "mend config.json",
            )
    config.pop("original_max_position_embeddings", None)
    kept = {"rope_type": kind, **{k: found[k] for k in ("rope_theta", *STATIC_ROPE[kind]) if k in found}}
    config["rope_parameters"] = kept


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_positive(config: dict[str, Any], path: Path) -> None:
    if config.get("rms_norm_eps") is None:
        config.pop("rms_norm_eps", None)
    elif not _is_positive(config["rms_norm_eps"]):
        own = FAMILIES[config["model_type"]].own_keys.get("rms_norm_eps", "rms_norm_eps")
        raise UsageError(
            f"{path}: {own} must be a positive number, but is {config['rms_norm_eps']!r}", "mend config.json"
        )
    if not isinstance(config.setdefault("tie_word_embeddings", False), bool):
        raise UsageError(
            f"{path}: tie_word_embeddings must be true or false, but is {config['tie_word_embeddings']!r}",
            "mend config.json",
        )


def _check_gpt2(config: dict[str, Any], path: Path) -> None:
    """What GPT-2's config can ask for beyond what is built here; fills in the FFN width that it leaves out."""
    for key, wanted in (
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
        ("scale_attn_weights", (True,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("add_cross_attention", (False,)),
    ):
        if config[key] not in wanted:
            raise UsageError(
                f"{path}: {key} must be {' or '.join(map(repr, wanted))}, but is {config[key]!r}",
                "choose a supported checkpoint",
            )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads:
        raise UsageError(
            f"{path}: n_embd must be a multiple of n_head, but got {hidden}, {heads}", "choose another checkpoint"
        )
    if config["intermediate_size"] is None and isinstance(hidden, int):
        config["intermediate_size"] = 4 * hidden


def check_window(config: dict[str, Any], where: Path) -> None:
    """Refuse attention that looks back less far than the context: the exported graph always looks back to the start."""
    if "sliding_window" not in FAMILIES[config["model_type"]].defaults or not config.get("use_sliding_window", True):
        return
    window, context = config["sliding_window"], config["max_position_embeddings"]
    if window is not None and (not isinstance(window, int) or window < context):
        raise UsageError(
            f"{where}: sliding_window must be null or at least max_position_embeddings, but got sliding_window={window!r}, "
            f"max_position_embeddings={context}",
            "choose a checkpoint with full attention, or lower max_position_embeddings to the window in a copy of "
            "config.json: within that context the window has no effect",
        )


def shape_of(config: dict[str, Any], where: Path) -> Shape:
    """The sizes in a config. Raises UsageError if one is missing or impossible."""
    gpt2 = FAMILIES[config["model_type"]].gpt2
    optional = tuple(k for k in ("num_key_value_heads", "head_dim") if config.get(k) is not None and not gpt2)
    for key in (*NEEDED_KEYS, *optional):
        if not isinstance(config.get(key), int) or config[key] < 1:
            own = FAMILIES[config["model_type"]].own_keys.get(key, key)
            raise UsageError(
                f"{where}: {own} must be a positive integer, but is {config.get(key)!r}", "mend config.json"
            )
    heads = config["num_attention_heads"]
    kv_heads = heads if gpt2 else config.get("num_key_value_heads") or heads
    head_dim = config["hidden_size"] // heads if gpt2 else config.get("head_dim") or config["hidden_size"] // heads
    if (
        heads % kv_heads
        or head_dim < 16
        or head_dim % 16
        or config["hidden_size"] % 16
        or config["intermediate_size"] % 16
    ):
        raise UsageError(
            f"{where}: heads must be a multiple of kv heads, and head_dim, hidden_size and intermediate_size of 16; got "
            f"{heads}, {kv_heads}, {head_dim}, {config['hidden_size']}, {config['intermediate_size']}",
            "choose another checkpoint",
        )
    return Shape(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        heads,
        kv_heads,
        head_dim,
        config["vocab_size"],
        bool(config.get("tie_word_embeddings", False)),
        config["model_type"],
        **({"positions": config["max_position_embeddings"], "gated": False} if gpt2 else {}),
    )
