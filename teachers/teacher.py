"""A trained model in a Hugging Face folder, checked before anything of it is executed.

Only safetensors are read; `config.json` is matched against a list of families and never hands control to remote code
(CVE-2025-32434, CVE-2026-5241: see docs/security.md).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.hardware_profiles.errors import UsageError
from paretune.spaces.candidate import Shape
from paretune.teachers.families import FAMILIES, axis_sizes, family_of
from paretune.teachers.pruned import fold_masks, masked_names, without_masks, zero_masks

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
MIN_HEADER_BYTES = 10
# Tensors of a layer that change what it computes; leftover buffers such as rotary_emb.inv_freq do no harm.
COMPUTING = (".bias", "norm.weight")


@dataclass(frozen=True)
class Teacher:
    """A checked model folder. Weights and tokenizer are loaded when asked for."""

    name: str
    folder: Path
    config: dict[str, Any]
    shape: Shape
    digest: str

    @property
    def weight_files(self) -> list[Path]:
        return _weight_files(self.folder)

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in expected_tensors(self.shape).values())

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors as float32 under their Hugging Face names; a tied head is not repeated, masks of torch.nn.utils.prune are
        applied. Raises UsageError on NaN."""
        return self._weights_and_masks()[0]

    @cached_property
    def has_masks(self) -> bool:
        """Whether the checkpoint holds masks of torch.nn.utils.prune."""
        return bool(masked_names({name: None for file in self.weight_files for name in _header(file)}))

    def masks(self, zeros: bool = False) -> dict[str, torch.Tensor]:
        """Boolean masks (True where a weight stays) that came with the checkpoint, by parameter; `zeros` takes those of every
        matrix that is zero in at least 5 % of its entries too."""
        weights, masks = self._weights_and_masks()
        return {**(zero_masks(weights) if zeros else {}), **masks}

    def _weights_and_masks(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        import torch
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for file in self.weight_files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    value = tensors.get_tensor(name).to(torch.float32)
                    if not bool(torch.isfinite(value).all()):
                        raise UsageError(
                            f"{file}: all weights must be finite, but tensor {name} holds NaN or infinity",
                            "use an undamaged checkpoint",
                        )
                    found[name] = value
        masks: dict[str, torch.Tensor] = {}
        if masked_names(found):
            try:
                found, masks = fold_masks(found)
            except ValueError as error:
                raise UsageError(f"{self.folder}: {error}", "save the pruned model again") from None
        expected = expected_tensors(self.shape)
        return {name: found[name] for name in expected}, {n: m for n, m in masks.items() if n in expected}

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's fast tokenizer (tokenizers.Tokenizer)."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def end_token(self) -> int:
        """Token id that ends a document; 0 if the config names none."""
        end = self.config.get("eos_token_id", 0)
        return int(end[0] if isinstance(end, list) else end or 0)


def load_teacher(name_or_folder: str) -> Teacher:
    """The embedded teacher by its name or a Hugging Face folder by its path. Raises UsageError before loading weights."""
    if name_or_folder == EMBEDDED:
        return _check(EMBEDDED, EMBEDDED_FOLDER)
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise UsageError(
            f"--teacher must be {EMBEDDED!r} or an existing Hugging Face folder, but {folder} is not a folder",
            "check the path",
        )
    return _check(folder.resolve().name, folder.resolve())


def _check(name: str, folder: Path) -> Teacher:
    config = read_config(folder / "config.json")
    shape = shape_of(config, folder / "config.json")
    _check_window(config, folder / "config.json")
    files = _weight_files(folder)
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise UsageError(
                f"weights must be safetensors, but {folder} only holds {pickles[0]}, which can run code when loaded",
                "convert it once where you trust it: model.save_pretrained(DIR) writes safetensors",
            )
        raise UsageError(f"{folder} holds no *.safetensors file", "name the folder that save_pretrained wrote")
    _check_tensors(files, shape)
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
    return teacher


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
    for key in ("auto_map", "trust_remote_code", "_name_or_path"):
        config.pop(key, None)
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("quantization_config", None)):
        if config.get(key, wanted) not in (wanted, None):
            raise UsageError(
                f"{path}: {key} must be {wanted}, but is {config[key]!r}",
                "choose an unquantized checkpoint with no biases but those that are standard in its family",
            )
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
    optional = tuple(key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None)
    for key in (*NEEDED_KEYS, *optional):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise UsageError(
                f"{where}: {key} must be a positive integer, but is {config.get(key)!r}", "mend config.json"
            )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
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
    )


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names of a model of this shape and family, with their shapes [out, in]."""
    sizes = axis_sizes(shape, shape.ffn, shape.kv_heads)
    layer = {name: tuple(sizes[axis] for axis in axes) for name, axes in family_of(shape).layer_tensors.items()}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        found |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    found["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab, shape.hidden)
    return found


def _check_tensors(files: list[Path], shape: Shape) -> None:
    from safetensors import SafetensorError

    actual: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.stat().st_size < MIN_HEADER_BYTES:
            raise UsageError(
                f"{file} has only {file.stat().st_size} bytes", "copy the folder again, it is half-written"
            )
        try:
            actual |= _header(file)
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{file} is not a complete safetensors file: {error}", "copy the folder again, it may be half-written"
            ) from None
    try:
        actual = without_masks(actual)
    except ValueError as error:
        raise UsageError(f"{files[0].parent}: {error}", "save the pruned model again") from None
    expected = expected_tensors(shape)
    for name in sorted(actual.keys() - expected.keys()):
        own = name.split(".", 3)[-1] in family_of(shape).layer_tensors  # of a layer beyond num_hidden_layers
        if name.startswith("model.layers.") and name.endswith(COMPUTING) and not own:
            raise UsageError(
                f"a {shape.family} has no tensor {name}, but {files[0].parent} holds one",
                "use the matching config.json",
            )
    for name, size in expected.items():
        if name not in actual:
            raise UsageError(f"{files[0].parent} lacks the tensor {name}", "use a complete checkpoint")
        if actual[name] != size:
            raise UsageError(
                f"tensor {name} must have shape {size} by config.json, but has {actual[name]}",
                "use the matching config.json",
            )


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "numpy") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _weight_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if p.is_file())


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
