"""A student in torch: the family's own Hugging Face module on the meta device, called with any set of weights.

Nothing of the forward pass is ours: `torch.func.functional_call` runs transformers' own class with the tensors it is
given, so prefix slices of one weight set, masked and fake-quantized ones all go the same way (DESIGN of whittle,
MatFormer arXiv 2310.07707). Per-layer widths follow from the tensors' shapes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from paretune.compression.network.gpt2 import MODULES_OF_GPT2, as_linears
from paretune.compression.quantize.grid import (
    Quantized,
    activation_block,
    fake_quantize,
    fake_quantize_activations,
    quantize,
)
from paretune.compression.quantize.per_tensor import fake_quantize_dynamic, fake_quantize_static
from paretune.spaces.candidate import Candidate, Format, Layer, Shape, group_for
from paretune.teachers.checkpoint.families import TOKEN_KEYS, Family, family_of, standard_family
from paretune.teachers.checkpoint.layout import stored_name

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GATE = "mlp.gate_proj"
# How many logits are computed at a time where all are needed but none kept: 64 MiB of float32.
LOGITS_AT_ONCE = 2**24
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Codes that were found on calibration text (GPTQ, clipping, static activation scales), by weight name.
Codes = Mapping[str, Quantized]
NO_CODES: Codes = MappingProxyType({})
Rounding = Callable[[torch.Tensor], torch.Tensor]


def student_family(candidate: Candidate, shape: Shape) -> Family:
    """The family of the student's standard config: the teacher's, except where transformers refuses the number of heads.

    It refuses a Llama whose hidden size is no multiple of it (KV groups were cut); a Mistral without sliding window is the
    same network.
    """
    return standard_family(shape, candidate.layers[0].kv_groups * shape.heads_per_group, candidate.hidden)


def student_config(config: Mapping[str, Any], candidate: Candidate, shape: Shape) -> Any:
    """A Hugging Face config of the candidate's (layer-uniform) sizes, of the class that `student_family` names."""
    first, family = candidate.layers[0], student_family(candidate, shape)
    changed = {
        **dict.fromkeys(TOKEN_KEYS),  # the classes' own defaults would be made up
        **config,
        "num_hidden_layers": len(candidate.layers),
        "hidden_size": candidate.width(shape),
        "intermediate_size": first.ffn,
        "num_attention_heads": first.kv_groups * shape.heads_per_group,
        "num_key_value_heads": first.kv_groups,
        "head_dim": shape.head_dim,
    }
    if family.gpt2:  # its config has no other number of heads (see layout.py), and no other names for them
        changed = {k: v for k, v in changed.items() if k not in ("num_key_value_heads", "head_dim")}
        changed["num_attention_heads"] = shape.heads
        changed |= {own: changed.pop(key) for key, own in family.own_keys.items()}
    changed.pop("model_type", None)
    if isinstance(changed.get("rope_parameters"), dict):  # the class fills it in
        changed["rope_parameters"] = dict(changed["rope_parameters"])
    return family.config_class(**{**changed, **family.full_attention})


class Network:
    """The forward pass of a decoder of `depth` layers, without weights of its own.

    `activations(candidate)` is a context in which the inputs of quantized matrices are rounded as the engine rounds them.
    """

    def __init__(self, config: Mapping[str, Any], shape: Shape, depth: int) -> None:
        plain = plain_candidate(shape, depth)
        template = student_config(config, plain, shape)
        with torch.device("meta"):
            self.module = student_family(plain, shape).model_class(template)
        self.gpt2 = family_of(shape).gpt2
        self.model: nn.Module = self.module.base_model
        if self.gpt2:
            as_linears(self.model)
        else:
            self.model.rotary_emb = type(self.model.rotary_emb)(copy.deepcopy(template))
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.layers: list[nn.Module] = list(self.model.h if self.gpt2 else self.model.layers)

    def part(self, layer: nn.Module, name: str) -> nn.Module:
        """The submodule of a layer by this project's name."""
        return layer.get_submodule(MODULES_OF_GPT2.get(name, name) if self.gpt2 else name)

    def present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the matrices `names` that the family's layers have: GPT-2 has no gate."""
        return tuple(name for name in names if not (self.gpt2 and name == GATE))

    def hidden(
        self, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, entered: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final hidden states [batch, length, hidden] of token ids [batch, length], or of what `entered` in their embeddings' place."""
        inner = {self._own_name(name): value for name, value in weights.items() if name.startswith("model.")}
        inputs = {"input_ids": ids} if entered is None else {"inputs_embeds": entered}
        output = torch.func.functional_call(self.model, inner, (), inputs | {"use_cache": False}, tie_weights=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def cached(
        self, weights: Mapping[str, torch.Tensor], ids: torch.Tensor, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """(final hidden states [batch, length, hidden], KV cache) of token ids [batch, length] after what the cache `past` holds."""
        inner = {self._own_name(name): value for name, value in weights.items() if name.startswith("model.")}
        inputs = {"input_ids": ids, "use_cache": True, "past_key_values": past}
        output = torch.func.functional_call(self.model, inner, (), inputs, tie_weights=False)
        return output.last_hidden_state, output.past_key_values

    def __call__(self, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocab]; a missing head is tied to the embedding."""
        return self.logits(weights, self.hidden(weights, ids))

    def logits(self, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of final hidden states [..., hidden], for callers that cannot hold those of all positions."""
        return nn.functional.linear(hidden, weights.get(HEAD, weights[EMBEDDING]))

    def token_losses(self, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats of every token but the first, [batch, length - 1], with few logits in memory at a time."""
        hidden, targets = self.hidden(weights, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        rows = max(1, LOGITS_AT_ONCE // len(weights[EMBEDDING]))
        losses = [
            nn.functional.cross_entropy(self.logits(weights, h).float(), t, reduction="none")
            for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        ]
        return torch.cat(losses).view(len(ids), -1)

    def _own_name(self, name: str) -> str:
        """The module's name of a parameter."""
        if not self.gpt2:
            return name.removeprefix("model.")
        if ".layers." not in name:
            return stored_name(name)
        _, _, layer, rest = name.split(".", 3)
        part, _, kind = rest.rpartition(".")
        return f"h.{layer}.{MODULES_OF_GPT2[part]}.{kind}"

    @contextlib.contextmanager
    def activations(self, candidate: Candidate, codes: Codes = NO_CODES) -> Iterator[None]:
        """Round activations to 8 bits in front of every matrix whose format says so.

        `codes` have the scales of static ones. Raises ValueError if they are missing.
        """
        handles = []
        for i, (module, spec) in enumerate(zip(self.layers, candidate.layers, strict=True)):
            for norm, reader, inner, form in (
                ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", spec.attention_format),
                ("post_attention_layernorm", "mlp.up_proj", "mlp.down_proj", spec.ffn_format),
            ):
                if form.activation != "fp32":
                    outer = activation_rounding(f"model.layers.{i}.{reader}.weight", form, codes)
                    handles.append(self.part(module, norm).register_forward_hook(_round_output(outer)))
                    own = activation_rounding(f"model.layers.{i}.{inner}.weight", form, codes)
                    handles.append(self.part(module, inner).register_forward_pre_hook(_round_input(own)))
        if candidate.head_format.activation != "fp32":
            final = self.model.get_submodule("ln_f" if self.gpt2 else "norm")
            rounding = activation_rounding(HEAD, candidate.head_format, codes)
            handles.append(final.register_forward_hook(_round_output(rounding)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def matmul_formats(candidate: Candidate) -> dict[str, Format]:
    """The format of every matrix that is multiplied by, by weight name: all but the embedding. Not every family has a gate."""
    found = {
        f"model.layers.{i}.{name}.weight": form
        for i, layer in enumerate(candidate.layers)
        for names, form in ((ATTENTION, layer.attention_format), (FFN, layer.ffn_format))
        for name in names
    }
    return found | {HEAD: candidate.head_format}


def quantized_weights(
    weights: Mapping[str, torch.Tensor], candidate: Candidate, codes: Codes = NO_CODES
) -> dict[str, torch.Tensor]:
    """Fake-quantized weights of a student, head and embedding as tensors of their own.

    `codes` are those of the matrices whose format needs calibration; everything else is rounded to nearest, with gradients.
    """
    found = dict(weights)
    for name, form in matmul_formats(candidate).items():
        if name not in weights and name.endswith(f"{GATE}.weight"):
            continue  # a family without gate; where one is missing by mistake the forward pass meets a meta tensor
        weight = weights.get(name, weights[EMBEDDING]) if name == HEAD else weights[name]
        if form.needs_calibration:
            found[name] = codes_of(name, weight, form, codes).dequantize()
        else:
            found[name] = fake_quantize(weight, form)
    found[EMBEDDING] = fake_quantize(weights[EMBEDDING], candidate.embedding_format)
    return found


def codes_of(name: str, weight: torch.Tensor, form: Format, codes: Codes) -> Quantized:
    """The codes of one matrix that ship: ready ones where calibration found them, else `weight` rounded to nearest.

    Raises ValueError if ready ones are missing or on another grid, so that nothing ships under a wrong name.
    """
    if not form.needs_calibration:
        return quantize(weight, form)
    if name not in codes:
        raise ValueError(f"the format of {name} needs calibration, so its codes must be given, but they are not")
    found, wanted = codes[name], (weight.shape, form.bits, group_for(form.group_size, weight.shape[1]))
    if (found.codes.shape, found.bits, found.group_size) != wanted:
        raise ValueError(
            f"the codes of {name} must be {tuple(wanted[0])} of {wanted[1]} bits in groups of {wanted[2]}, "
            f"but got {tuple(found.codes.shape)} of {found.bits} bits in groups of {found.group_size}"
        )
    return found


def plain_candidate(shape: Shape, depth: int) -> Candidate:
    """`depth` layers of the teacher's own widths, unquantized."""
    return Candidate((Layer(shape.ffn, shape.kv_heads),) * depth)


def activation_rounding(name: str, form: Format, codes: Codes) -> Rounding:
    """What the engine does to the inputs of the weight `name`."""
    if form.activation == "dynamic":
        return fake_quantize_dynamic
    if form.activation == "static":
        if name not in codes or not codes[name].input_scale > 0:
            raise ValueError(f"the activations of {name} are static, so their scale must be given, but it is not")
        return functools.partial(fake_quantize_static, scale=codes[name].input_scale)
    return lambda x: fake_quantize_activations(x, activation_block(form, x.shape[-1]))


def _round_output(rounding: Rounding) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return rounding(output)

    return hook


def _round_input(rounding: Rounding) -> Any:
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    return hook
