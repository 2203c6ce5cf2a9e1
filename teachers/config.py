"""config.json of a teacher: read without handing control to anything it names, checked key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paretune.hardware_profiles.access import is_file, unreadable
from paretune.hardware_profiles.errors import UsageError
from paretune.spaces.candidate import Shape
from paretune.teachers.families import FAMILIES

STATIC_ROPE = {"default", "linear", "llama3"}
NEEDED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
    config = {**FAMILIES[name].defaults, **config}
    config |= {key: config.get(own) for key, own in FAMILIES[name].own_keys.items()}
    for key in ("auto_map", "trust_remote_code", "_name_or_path"):
        config.pop(key, None)
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("quantization_config", None)):
        if config.get(key, wanted) not in (wanted, None):
            raise UsageError(
                f"{path}: {key} must be {wanted}, but is {config[key]!r}",
                "choose an unquantized checkpoint with no biases but those that are standard in its family",
            )
    if FAMILIES[name].gpt2:
        _check_gpt2(config, path)
        return config
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(
            f"{path}: hidden_act must be 'silu', but is {config['hidden_act']!r}", "choose a supported checkpoint"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if not isinstance(kind, str) or kind not in STATIC_ROPE:
        raise UsageError(
            f"{path}: rope_type must be one of {sorted(STATIC_ROPE)}, but is {kind!r}", "choose a supported checkpoint"
        )
    return config


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


def check_token_ids(config: dict[str, Any], shape: Shape, where: Path) -> None:
    """Refuse special tokens that the embedding has no row for."""
    for key in TOKEN_IDS:
        value = config.get(key)
        ids = value if isinstance(value, list) else [value]
        good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < shape.vocab for i in ids)
        if value is not None and not (ids and good):
            raise UsageError(
                f"{where}: {key} must be null, a token id from 0 to {shape.vocab - 1} or a list of them, but is {value!r}",
                "mend config.json",
            )
