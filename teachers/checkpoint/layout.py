"""How a family stores its tensors, where that is not how this project names them: GPT-2.

GPT-2 keeps matrices as Conv1D, which is [in, out], and q, k and v side by side in one `c_attn`. Everything else here reads
Llama's names and [out, in]. A GPT-2 with fewer heads than its hidden width asks for has no standard config, so the heads that
were cut are written as zeros: the same function.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.families import POSITIONS, Axis, axis_sizes, family_of

if TYPE_CHECKING:
    import torch

GPT2_ROOT = {
    "model.embed_tokens.weight": "wte.weight",
    POSITIONS: "wpe.weight",
    "model.norm.weight": "ln_f.weight",
    "model.norm.bias": "ln_f.bias",
}
GPT2_PARTS = {
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
GPT2_PREFIX = "transformer."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def stored_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a family's checkpoint; GPT-2's without the prefix `transformer.`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, size in canonical_shapes(shape).items():
        if not family_of(shape).gpt2:
            found[name] = size
            continue
        stored, is_matrix = stored_name(name), len(size) == 2 and ".layers." in name
        size = size[::-1] if is_matrix else size
        before = found.get(stored, (*size[:-1], 0))  # q, k and v come one after the other
        found[stored] = (*size[:-1], before[-1] + size[-1])
    return found


def canonical_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """This project's tensor names of a model of this shape and family, with their shapes [out, in]; a tied head is left out."""
    sizes = axis_sizes(shape, shape.ffn, shape.kv_heads)

    def size_of(axes: tuple[Axis, ...]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in axes)

    family = family_of(shape)
    found = {name: size_of(axes) for name, axes in family.root_tensors.items()}
    layer = {name: size_of(axes) for name, axes in family.layer_tensors.items()}
    for i in range(shape.layers):
        found |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab, shape.hidden)
    return found


def stored_name(name: str) -> str:
    """GPT-2's name of one of this project's tensors; q, k and v share one."""
    if name in GPT2_ROOT or not name.startswith("model.layers."):
        return GPT2_ROOT.get(name, name)
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"h.{layer}.{GPT2_PARTS[part]}.{kind}"


def stored_as(name: str, shape: Shape, names: Container[str]) -> bool:
    """Whether `names`, those of a checkpoint, has the tensor that holds this project's `name`."""
    if not family_of(shape).gpt2:
        return name in names
    return stored_name(name) in names or GPT2_PREFIX + stored_name(name) in names


def from_stored(tensors: Mapping[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """This project's tensors of a checkpoint whose names and shapes were checked; GPT-2's are views, transposed."""
    names = canonical_shapes(shape)
    if not family_of(shape).gpt2:
        return {name: tensors[name] for name in names}
    plain = {name.removeprefix(GPT2_PREFIX): value for name, value in tensors.items()}
    found = {}
    for name, size in names.items():
        value = plain[stored_name(name)]
        value = value.t() if len(size) == 2 and ".layers." in name else value
        part = _part(name)
        found[name] = value if part is None else value.narrow(0, part * size[0], size[0])
    return found


def to_stored(weights: Mapping[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """Inverse of `from_stored` for a student of any widths: what its Hugging Face folder holds."""
    import torch

    if not family_of(shape).gpt2:
        return dict(weights)
    found: dict[str, torch.Tensor] = {}
    heads = shape.heads * shape.head_dim
    for name, value in sorted(weights.items(), key=lambda item: _part(item[0]) or 0):  # q before k before v
        if _part(name) is not None:
            value = _padded(value, 0, heads)
        elif ".self_attn.o_proj.weight" in name:
            value = _padded(value, 1, heads)
        value = value.t() if value.ndim == 2 and ".layers." in name else value
        stored = stored_name(name) if name == "lm_head.weight" else GPT2_PREFIX + stored_name(name)
        found[stored] = torch.cat([found[stored], value], -1) if stored in found else value
    return found


def _part(name: str) -> int | None:
    """0, 1, 2 for a tensor of q, k, v."""
    return next((i for i, p in enumerate(QKV) if f".{p}." in name), None)


def _padded(value: torch.Tensor, dimension: int, length: int) -> torch.Tensor:
    """Zeros behind, up to `length`."""
    size = list(value.shape)
    if size[dimension] == length:
        return value
    size[dimension] = length
    found = value.new_zeros(size)
    found.narrow(dimension, 0, value.shape[dimension]).copy_(value)
    return found
