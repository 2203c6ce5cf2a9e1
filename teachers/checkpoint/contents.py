"""The tensors of a checkpoint against what its config.json asks for: none missing, none too many, all finite."""

from __future__ import annotations

import re
from pathlib import Path

from paretune.common.errors import UsageError
from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.families import family_of
from paretune.teachers.checkpoint.layout import GPT2_PREFIX, stored_shapes
from paretune.teachers.checkpoint.pruned import MASK, ORIGINAL, without_masks
from paretune.teachers.checkpoint.stored import NUMBERS, Stored

# Buffers that old checkpoints hold and transformers ignores: rotary frequencies, GPT-2's causal mask.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))")


def check_tensors(stored: dict[str, Stored], shape: Shape, folder: Path) -> None:
    """Raises UsageError with the tensor that is wrong. Masks of torch.nn.utils.prune may stand beside what they mask."""
    gpt2 = family_of(shape).gpt2
    tensors = {name.removeprefix(GPT2_PREFIX) if gpt2 else name: tensor for name, tensor in stored.items()}
    try:
        actual = without_masks({name: tensor.shape for name, tensor in tensors.items()})
    except ValueError as error:
        raise UsageError(f"{folder}: {error}", "save the pruned model again") from None
    expected = stored_shapes(shape)
    for name in sorted(actual.keys() - expected.keys()):
        if not BUFFERS.fullmatch(name) and not (name == "lm_head.weight" and shape.tied):
            raise UsageError(
                f"a {shape.family} has no tensor {name} ({shape.layers} layers by config.json), but {folder} holds one",
                "use the matching config.json",
            )
    for name, size in expected.items():
        if name not in actual:
            raise UsageError(f"{folder} lacks the tensor {name}", "use a complete checkpoint")
        if actual[name] != size:
            raise UsageError(
                f"tensor {name} must have shape {size} by config.json, but has {actual[name]}",
                "use the matching config.json",
            )
        held = name if name in tensors else name + ORIGINAL
        _check_numbers(held, tensors[held])
        if held != name and not tensors[name + MASK].is_mask():
            raise UsageError(
                f"{folder}: {name}{MASK} must hold zeros and ones, but holds other values",
                "save the pruned model again",
            )
    _check_head(tensors, shape, folder)


def _check_numbers(name: str, tensor: Stored) -> None:
    if tensor.dtype not in NUMBERS:
        raise UsageError(
            f"tensor {name} must hold one of {', '.join(NUMBERS)}, but holds {tensor.dtype}",
            "use an unquantized checkpoint",
        )
    if not tensor.is_finite():
        raise UsageError(
            f"{tensor.file}: all weights must be finite, but tensor {name} holds NaN or infinity",
            "use an undamaged checkpoint",
        )


def _check_head(tensors: dict[str, Stored], shape: Shape, folder: Path) -> None:
    """Refuse a head beside a tied embedding that is not the same: which of the two was meant cannot be told."""
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("wte.weight" if family_of(shape).gpt2 else "model.embed_tokens.weight")
    if shape.tied and head is not None and embedding is not None and not head.equals(embedding):
        raise UsageError(
            f"{folder / 'config.json'} says that the head is tied, but tensor lm_head.weight differs from the embedding",
            'set "tie_word_embeddings": false in a copy of config.json, or leave lm_head.weight out',
        )
