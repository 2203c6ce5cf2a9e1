"""The matrices of any torch module: which there are, their groups, and how they are rounded, masked and counted.

A weight of a Linear [N, K] is a matrix as it is; that of a convolution [out, in, *kernel] is read as one with a row per output
channel, K = in * kernel size, and that of a transposed convolution [in, out, *kernel] with its first two axes exchanged.
Linear weights have the engine's groups along K; convolutions have one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from paretune.compression.prune.masks import mask_for
from paretune.compression.quantize.grid import Quantized, scales_of
from paretune.spaces.candidate import BLOCK, Format, Pattern, PatternKind, group_for
from paretune.spaces.module_candidate import MatrixGroup, ModuleCandidate, ModuleShape, SliceAxis
from paretune.teachers.plugins.plugin import Batch, Forwarding, TeacherPlugin, still

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
GROUP_SIZES = (32, 128)
MOST_GROUPS = 6


@dataclass(frozen=True)
class Matrix:
    """One weight: its parameter's name, its module's path, and how it is read as rows."""

    name: str
    path: str
    kind: Literal["linear", "convolution", "transposed"]

    @property
    def axis(self) -> int:
        """The weight's axis of output channels."""
        return 1 if self.kind == "transposed" else 0

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K], a row per output channel."""
        return (weight.transpose(0, 1) if self.kind == "transposed" else weight).flatten(1)

    def whole(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Inverse of `rows`, in the shape of `like`."""
        if self.kind == "transposed":
            return rows.reshape(like.shape[1], like.shape[0], *like.shape[2:]).transpose(0, 1)
        return rows.reshape(like.shape)

    def group_size(self, form: Format, k: int) -> int:
        """Columns that share a scale: the engine's group for a Linear of fewer than 8 bits, else all K."""
        if self.kind != "linear" or form.group_size == 0 or k % 16:
            return k
        return group_for(form.group_size, k)


def matrices_of(module: nn.Module) -> dict[str, Matrix]:
    """Weights of Linear and convolutions by parameter name, in the module's order; one that is shared counts once."""
    found = {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for path, part in module.named_modules():
        kind: Literal["linear", "convolution", "transposed"]
        if isinstance(part, nn.Linear):
            kind = "linear"
        elif isinstance(part, CONVOLUTIONS):
            kind = "convolution"
        elif isinstance(part, TRANSPOSED):
            kind = "transposed"
        else:
            continue
        name = names.get(id(part.weight))
        if name is not None and name not in found:
            found[name] = Matrix(name, path, kind)
    return found


def quantize_matrix(weight: torch.Tensor, matrix: Matrix, form: Format) -> Quantized:
    """Codes and scales of `weight` read as rows, rounded to nearest on the engine's symmetric grid."""
    rows = matrix.rows(weight.detach().float())
    n, k = rows.shape
    group = matrix.group_size(form, k)
    blocks = rows.reshape(n, k // group, group)
    scales, top = scales_of(blocks, form.bits), 2 ** (form.bits - 1)
    codes = torch.round(blocks / scales.unsqueeze(-1)).clamp_(-top, top - 1).to(torch.int8)
    return Quantized(codes.view(n, k), scales, form.bits, group)


def fake_quantize_matrix(weight: torch.Tensor, matrix: Matrix, form: Format) -> torch.Tensor:
    """What the engine will compute with, in the shape of `weight`; gradients pass straight through."""
    if form.bits == 32:
        return weight
    rounded = matrix.whole(quantize_matrix(weight, matrix, form).dequantize(), weight)
    return weight + (rounded - weight).detach() if weight.requires_grad else rounded.contiguous()


def effective_weights(
    weights: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix], forms: Mapping[str, Format]
) -> dict[str, torch.Tensor]:
    """All parameters with the matrices of `forms` (by parameter name) fake-quantized."""
    return {
        name: fake_quantize_matrix(value, matrices[name], forms[name]) if name in forms else value
        for name, value in weights.items()
    }


def groups_of(matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """Parameter name to group: the part of the module's path that tells most apart, at most six groups in their order.

    The first component of the path ("encoder", "decoder") if there are several, else the next one below it.
    """
    paths = [m.path.split(".") for m in matrices.values()]
    depth = 0
    while len({p[depth] for p in paths if len(p) > depth}) == 1 and all(len(p) > depth + 1 for p in paths):
        depth += 1
    heads = [".".join(p[: depth + 1]) or "all" for p in paths]
    known = list(dict.fromkeys(heads))
    per = -(-len(known) // MOST_GROUPS)
    names: dict[str, str] = {}
    for start in range(0, len(known), per):
        run = known[start : start + per]
        names |= dict.fromkeys(run, run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return {name: names[head] for name, head in zip(matrices, heads, strict=True)}


def forms_of(candidate: ModuleCandidate, groups: Mapping[str, str], names: Mapping[str, Any]) -> dict[str, Format]:
    """Format of every quantized matrix among `names`."""
    found = {name: candidate.of(groups[name]).format for name in names}
    return {name: form for name, form in found.items() if form.bits != 32}


def fits(pattern: PatternKind, k: int) -> bool:
    """Whether a matrix of K columns can have the pattern."""
    return k % 4 == 0 if pattern == "2:4" else k % 16 == 0 if pattern == "block" else True


def matrix_mask(
    weight: torch.Tensor, matrix: Matrix, pattern: Pattern, norms: torch.Tensor | None
) -> torch.Tensor | None:
    """Mask in the shape of `weight`, True where it stays; None where the pattern does not fit.

    `norms` [K] or [N, K] are the L2 norms of the input features, needed for "wanda".
    """
    rows = matrix.rows(weight)
    if pattern.kind == "none" or not fits(pattern.kind, rows.shape[1]):
        return None
    return matrix.whole(mask_for(rows, pattern, norms), weight).contiguous()


def shape_of_module(plugin: TeacherPlugin, module: nn.Module) -> ModuleShape:
    """Groups, their costs, and how every width scales them, by running one calibration batch per choice."""
    matrices = matrices_of(module)
    groups, batch = groups_of(matrices), plugin.batches("calibration")[0]
    names = list(dict.fromkeys(groups.values()))
    full = _macs(plugin, module, batch, groups, names)
    parameters = dict(module.named_parameters())
    found = [_group(name, macs, groups, matrices, parameters) for name, macs in zip(names, full, strict=True)]
    own = {width.name: width.choices[-1] for width in plugin.widths}
    axes = []
    for width in plugin.widths:
        shares = []
        for choice in width.choices:
            cut = module if choice == width.choices[-1] else plugin.slice(module, {**own, width.name: choice})
            left = _macs(plugin, still(cut), batch, groups, names)
            shares.append(tuple(a / b if b else 1.0 for a, b in zip(left, full, strict=True)))
        axes.append(SliceAxis(width.name, tuple(width.choices), tuple(shares)))
    return ModuleShape(tuple(found), tuple(axes), sum(p.numel() for p in parameters.values()))


def _group(
    name: str,
    macs: float,
    groups: Mapping[str, str],
    matrices: Mapping[str, Matrix],
    parameters: Mapping[str, torch.Tensor],
) -> MatrixGroup:
    members = {n: matrices[n].rows(parameters[n]).shape for n, group in groups.items() if group == name}
    kinds: tuple[PatternKind, ...] = ("2:4", "unstructured", "block")
    patterns = tuple(kind for kind in kinds if any(fits(kind, shape[1]) for shape in members.values()))
    linear = [shape[1] for n, shape in members.items() if matrices[n].kind == "linear" and shape[1] % BLOCK == 0]
    sizes = (*(size for size in GROUP_SIZES if any(k > size for k in linear)), 0)
    return MatrixGroup(name, sum(n * k for n, k in members.values()), macs, patterns, sizes)


def _macs(
    plugin: TeacherPlugin, module: nn.Module, batch: Batch, groups: Mapping[str, str], names: list[str]
) -> list[float]:
    """Multiply-adds of one forward per group."""
    found = dict.fromkeys(names, 0.0)
    matrices = matrices_of(module)

    def count(matrix: Matrix, part: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        # every weight is used once per position: of the output, and of the input where the convolution is transposed
        weight = part.weight
        over, channels = (inputs[0], weight.shape[0]) if matrix.kind == "transposed" else (output, weight.shape[0])
        found[groups[matrix.name]] += over.numel() / channels * weight.numel()

    with _watching(module, matrices, count), torch.no_grad():
        Forwarding(plugin, module)(*batch.inputs)
    return [found[name] for name in names]


def input_norms(plugin: TeacherPlugin, module: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """L2 norm of every input feature of every matrix, [K] (grouped convolutions [N, K]), over `batches`.

    A convolution's input channel has one norm for all positions of the kernel, which differ only at the borders.
    """
    matrices = matrices_of(module)
    squares: dict[str, torch.Tensor] = {}

    def collect(matrix: Matrix, part: nn.Module, inputs: tuple[Any, ...], _output: torch.Tensor) -> None:
        x = inputs[0].detach().float()
        channels = x.flatten(0, -2) if matrix.kind == "linear" else x.transpose(0, 1).flatten(1).T
        value = channels.square().sum(0)
        squares[matrix.name] = squares[matrix.name] + value if matrix.name in squares else value

    with _watching(module, matrices, collect), torch.no_grad():
        for batch in batches:
            Forwarding(plugin, module)(*batch.inputs)
    parameters = dict(module.named_parameters())
    return {
        name: _per_column(matrices[name], module.get_submodule(matrices[name].path), value.sqrt(), parameters[name])
        for name, value in squares.items()
    }


def _per_column(matrix: Matrix, part: Any, norms: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """From norms per input channel to norms per column of the rows."""
    if matrix.kind == "linear":
        return norms
    kernel = weight[0, 0].numel()
    if matrix.kind == "transposed" or part.groups == 1:
        return norms.repeat_interleave(kernel)
    per_group = norms.view(part.groups, -1).repeat_interleave(kernel, 1)
    return per_group.repeat_interleave(weight.shape[0] // int(part.groups), 0)


@contextmanager
def _watching(module: nn.Module, matrices: Mapping[str, Matrix], see: Any) -> Iterator[None]:
    """A context in which `see(matrix, part, inputs, output)` is called for every matrix that is used."""
    handles = []
    for matrix in matrices.values():

        def hook(part: nn.Module, inputs: tuple[Any, ...], output: Any, matrix: Matrix = matrix) -> None:
            see(matrix, part, inputs, output)

        handles.append(module.get_submodule(matrix.path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
