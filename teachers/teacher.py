"""A trained model in a Hugging Face folder, checked before anything of it is executed.

Only safetensors are read; `config.json` is matched against a list of families and never hands control to remote code
(CVE-2025-32434, CVE-2026-5241: see docs/security.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.hardware_profiles.errors import UsageError
from paretune.spaces.candidate import Shape
from paretune.teachers.families import FAMILIES, family_of
from paretune.teachers.layout import GPT2_PREFIX, canonical_shapes, from_stored, stored_shapes
from paretune.teachers.stored import NUMBERS, Stored, read_headers, weight_files

if TYPE_CHECKING:
    import torch

EMBEDDED = "stdlib-coder"
EMBEDDED_FOLDER = Path(__file__).resolve().parent / "stdlib_coder"
STATIC_ROPE = {"default", "linear", "llama3"}
NEEDED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
# Buffers that old checkpoints hold and transformers ignores: rotary frequencies, GPT-2's causal mask.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))")
# A vocabulary is often padded to a round number; a tokenizer that covers less than this belongs to another model.
LEAST_COVERAGE = 0.5
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Teacher:
    """A checked model folder. Weights and tokenizer are loaded when asked for.

    `cache` is where weights that cannot be used as they lie (not float32, or in GPT-2's layout) are kept converted, so that
    all processes of the machine map one copy; without it every caller converts for itself.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shape: Shape
    digest: str
    cache: Path | None = None

    @property
    def weight_files(self) -> list[Path]:
        return weight_files(self.folder)

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in expected_tensors(self.shape).values())

    def kept_in(self, cache: Path) -> Teacher:
        """The same teacher, its converted weights (if it needs any) in `cache`."""
        return replace(self, cache=cache)

    @property
    def is_plain(self) -> bool:
        """Whether its files can be memory-mapped and used as they are."""
        stored = read_headers(self.weight_files)
        return not family_of(self.shape).gpt2 and {t.dtype for t in stored.values()} == {"F32"}

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors as float32 under this project's names, memory-mapped where they can be; a tied head is not repeated.

        Do not write into them.
        """
        from paretune.teachers.checkpoint import load_tensors, save_tensors

        if self.cache is None or self.is_plain:
            return self._converted()
        kept = self.cache / "teachers" / f"{self.name}-{self.digest}.safetensors"
        if not kept.exists():
            save_tensors(kept, self._converted(), {"teacher": self.name})
        tensors, _ = load_tensors(kept)
        return {name: tensors[name] for name in expected_tensors(self.shape)}

    def _converted(self) -> dict[str, torch.Tensor]:
        import torch
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for file in self.weight_files:
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        named = from_stored(found, self.shape)
        return {name: value.to(torch.float32).contiguous() for name, value in named.items()}

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's fast tokenizer (tokenizers.Tokenizer)."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def end_token(self) -> int:
        """Token id that ends a document; 0 if the config names none."""
        end = self.config.get("eos_token_id")
        return int(end[0] if isinstance(end, list) else end or 0)


def load_teacher(name_or_folder: str) -> Teacher:
    """The embedded teacher by its name or a Hugging Face folder by its path; every file is checked, none kept in memory.

    Raises UsageError with the file, key or tensor that is wrong.
    """
    if name_or_folder == EMBEDDED:
        return _check(EMBEDDED, EMBEDDED_FOLDER)
    if not is_folder(name_or_folder):
        folder = name_or_folder if len(name_or_folder) < 200 else f"{name_or_folder[:200]}…"
        raise UsageError(
            f"--teacher must be {EMBEDDED!r} or an existing Hugging Face folder, but {folder or 'an empty path'} is not a folder",
            "check the path",
        )
    folder = Path(name_or_folder)
    return _check(folder.resolve().name, folder.resolve())


def is_folder(path: str) -> bool:
    """Whether an existing folder is named; an empty or impossible path (too long, with a zero byte) names none."""
    try:
        return bool(path) and Path(path).is_dir()
    except (OSError, ValueError):
        return False


def _check(name: str, folder: Path) -> Teacher:
    config = read_config(folder / "config.json")
    shape = shape_of(config, folder / "config.json")
    _check_window(config, folder / "config.json")
    _check_token_ids(config, shape, folder / "config.json")
    files = weight_files(folder)
    _check_tensors(read_headers(files), shape, folder)
    if not (folder / "tokenizer.json").exists():
        raise UsageError(
            f"{folder} holds no tokenizer.json", "save the tokenizer into it: tokenizer.save_pretrained(DIR)"
        )
    teacher = Teacher(name, folder, config, shape, _digest([folder / "config.json", folder / "tokenizer.json", *files]))
    vocabulary = _vocabulary_size(teacher)
    if vocabulary > shape.vocab:
        raise UsageError(
            f"the tokenizer has {vocabulary} tokens, but the model only {shape.vocab}",
            "use the tokenizer it was trained with",
        )
    if vocabulary < LEAST_COVERAGE * shape.vocab:
        raise UsageError(
            f"the tokenizer must cover at least half of the embedding, but has {vocabulary} tokens of {shape.vocab}",
            "use the tokenizer it was trained with",
        )
    return teacher


def _check_token_ids(config: dict[str, Any], shape: Shape, where: Path) -> None:
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


def _vocabulary_size(teacher: Teacher) -> int:
    """Highest token id plus one: more than the number of tokens where ids are left out."""
    try:
        return 1 + max(teacher.tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # tokenizers raises bare Exception
        raise UsageError(
            f"{teacher.folder / 'tokenizer.json'} cannot be read: {error}", "save the tokenizer again"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of a supported family without the keys that could name code, and with the family's defaults.

    Raises UsageError.
    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no config.json", "name a complete Hugging Face folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
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


def _check_window(config: dict[str, Any], where: Path) -> None:
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
            raise UsageError(
                f"{where}: {key} must be a positive integer, but is {config.get(key)!r}", "mend config.json"
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


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """This project's tensor names of a model of this shape and family, with their shapes [out, in]."""
    return canonical_shapes(shape)


def _check_tensors(stored: dict[str, Stored], shape: Shape, folder: Path) -> None:
    """Every tensor that the family computes with and no other, in its shape, of real numbers, all finite."""
    tensors = {n.removeprefix(GPT2_PREFIX) if family_of(shape).gpt2 else n: t for n, t in stored.items()}
    expected = stored_shapes(shape)
    for name in sorted(tensors.keys() - expected.keys()):
        if not BUFFERS.fullmatch(name) and not (name == "lm_head.weight" and shape.tied):
            raise UsageError(
                f"a {shape.family} has no tensor {name} ({shape.layers} layers by config.json), but {folder} holds one",
                "use the matching config.json",
            )
    for name, size in expected.items():
        if name not in tensors:
            raise UsageError(f"{folder} lacks the tensor {name}", "use a complete checkpoint")
        if tensors[name].shape != size:
            raise UsageError(
                f"tensor {name} must have shape {size} by config.json, but has {tensors[name].shape}",
                "use the matching config.json",
            )
        if tensors[name].dtype not in NUMBERS:
            raise UsageError(
                f"tensor {name} must hold one of {', '.join(NUMBERS)}, but holds {tensors[name].dtype}",
                "use an unquantized checkpoint",
            )
        if not tensors[name].is_finite():
            raise UsageError(
                f"{tensors[name].file}: all weights must be finite, but tensor {name} holds NaN or infinity",
                "use an undamaged checkpoint",
            )
    _check_head(tensors, shape, folder)


def _check_head(tensors: dict[str, Stored], shape: Shape, folder: Path) -> None:
    """Refuse a head beside a tied embedding that is not the same: which of the two was meant cannot be told."""
    head = tensors.get("lm_head.weight")
    embedding = tensors["wte.weight" if family_of(shape).gpt2 else "model.embed_tokens.weight"]
    if shape.tied and head is not None and not head.equals(embedding):
        raise UsageError(
            f"{folder / 'config.json'} says that the head is tied, but tensor lm_head.weight differs from the embedding",
            'set "tie_word_embeddings": false in a copy of config.json, or leave lm_head.weight out',
        )


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
