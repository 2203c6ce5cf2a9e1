"""The student in torch against transformers' own model, and its activation hooks against a forward pass written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paretune.compression.network.student import (
    ATTENTION,
    EMBEDDING,
    FFN,
    HEAD,
    Network,
    quantized_weights,
    student_config,
)
from paretune.compression.prune import Importance, slice_weights
from paretune.compression.quantize import fake_quantize, fake_quantize_activations
from paretune.spaces import Candidate, Format, Layer, Shape
from paretune.spaces.candidate import group_for
from paretune.teachers.checkpoint.teacher import EMBEDDED, Teacher, load_teacher

VARIANTS = {
    "tied": {},
    "untied, wide heads": {"tie_word_embeddings": False, "head_dim": 32},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "large epsilon": {"rms_norm_eps": 0.3},
    "Mistral": {"family": "mistral"},
    "Qwen2": {"family": "qwen2", "tie_word_embeddings": False},
    "Qwen3, large epsilon": {"family": "qwen3", "rms_norm_eps": 0.3},
}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 288, (3, 40), generator=torch.Generator().manual_seed(0))


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return logits


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_full_network_is_transformers_own_model(
    tmp_path: Path, write_teacher: Callable[..., Path], changes: dict[str, object], ids: torch.Tensor
) -> None:
    teacher = load_teacher(str(write_teacher(tmp_path / "model", **changes)))
    expected = transformers_logits(teacher.folder, ids)
    with torch.no_grad():
        assert (network_of(teacher)(teacher.weights(), ids) - expected).abs().max() <= 1e-5
        config = {key: value for key, value in teacher.config.items() if key not in ("rope_parameters", "rms_norm_eps")}
        moved = {**teacher.weights(), "model.norm.weight": teacher.weights()["model.norm.weight"] * 1.01}
        assert (network_of(teacher)(moved, ids) - expected).abs().max() > 1e-3
        if "rope_parameters" in changes or "rms_norm_eps" in changes:  # the variant is seen, not ignored on both sides
            plain = Network(config, teacher.shape, teacher.shape.layers)
            assert (plain(teacher.weights(), ids) - expected).abs().max() > 1e-2


def network_of(teacher: Teacher) -> Network:
    return Network(teacher.config, teacher.shape, teacher.shape.layers)


def test_the_embedded_teacher_is_transformers_own_model_too() -> None:
    teacher = load_teacher(EMBEDDED)
    ids = torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (
            network_of(teacher)(teacher.weights(), ids) - transformers_logits(teacher.folder, ids)
        ).abs().max() <= 1e-4


def test_a_sliced_student_is_the_transformers_model_of_its_config(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    from transformers import LlamaForCausalLM

    shape = tiny_teacher.shape
    order = Importance(tuple(tuple(range(128)) for _ in range(3)), ((0, 1),) * 3, (0, 2, 1))
    candidate = Candidate((Layer(96, 1),) * 2)
    weights = slice_weights(tiny_weights, candidate, order, shape)
    config = student_config(tiny_teacher.config, candidate, shape)
    assert (
        config.num_hidden_layers,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    ) == (2, 96, 2, 1, 16)
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict({name: value.clone() for name, value in weights.items()}, strict=False)
    assert missing.missing_keys == [HEAD]
    model.tie_weights()
    with torch.no_grad():
        network = Network(tiny_teacher.config, shape, 2)
        assert (network(weights, ids) - model(ids).logits).abs().max() <= 1e-5
        assert (network.hidden(weights, ids) - model.model(ids).last_hidden_state).abs().max() <= 1e-5


def test_layers_of_different_widths_run_in_one_network(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    """Oracle: zeroing the output columns of what the narrower layers lack."""
    order = Importance(tuple(tuple(range(128)) for _ in range(3)), ((0, 1),) * 3, (0, 2, 1))
    candidate = Candidate((Layer(32, 1), Layer(128, 2), Layer(64, 2)))
    zeroed = dict(tiny_weights)
    for i, layer in enumerate(candidate.layers):
        for name, kept in (("mlp.down_proj", layer.ffn), ("self_attn.o_proj", 32 * layer.kv_groups)):
            value = tiny_weights[f"model.layers.{i}.{name}.weight"].clone()
            value[:, kept:] = 0
            zeroed[f"model.layers.{i}.{name}.weight"] = value
    network = network_of(tiny_teacher)
    with torch.no_grad():
        cut = network(slice_weights(tiny_weights, candidate, order, tiny_teacher.shape), ids)
        assert (cut - network(zeroed, ids)).abs().max() <= 1e-4


def test_quantized_weights_round_each_matrix_in_its_own_format(tiny_weights: dict[str, torch.Tensor]) -> None:
    a, b, head, embedding = Format(4, 32, "int8"), Format(8, 64, "int8"), Format(4, 64, "fp32"), Format(8, 32)
    candidate = Candidate(
        (Layer(128, 2, a, b), Layer(128, 2, b, Format()), Layer(128, 2, Format(), a)), head, embedding
    )
    found = quantized_weights(tiny_weights, candidate)
    assert found.keys() == {*tiny_weights, HEAD}
    for i, layer in enumerate(candidate.layers):
        for name in (*ATTENTION, *FFN):
            full = f"model.layers.{i}.{name}.weight"
            form = layer.attention_format if name in ATTENTION else layer.ffn_format
            assert torch.equal(found[full], fake_quantize(tiny_weights[full], form))
            assert torch.equal(found[full], tiny_weights[full]) == (form.bits == 32)
    assert torch.equal(found[HEAD], fake_quantize(tiny_weights[EMBEDDING], head))
    assert torch.equal(found[EMBEDDING], fake_quantize(tiny_weights[EMBEDDING], embedding))
    assert torch.equal(found["model.norm.weight"], tiny_weights["model.norm.weight"])


def written_out(
    weights: dict[str, torch.Tensor], candidate: Candidate, shape: Shape, ids: torch.Tensor
) -> torch.Tensor:
    """A Llama forward pass in plain operations, activations rounded in front of every matrix that asks for it."""

    def linear(x: torch.Tensor, name: str, form: Format) -> torch.Tensor:
        if form.activation == "int8":
            x = fake_quantize_activations(x, group_for(form.group_size, x.shape[-1]))
        return x @ weights[name].T

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    length = ids.shape[1]
    frequency = 10000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.arange(length)[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    stream = weights[EMBEDDING][ids]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i, layer in enumerate(candidate.layers):
        path, form = f"model.layers.{i}.", layer.attention_format
        x = norm(stream, f"{path}input_layernorm.weight")
        q, k, v = (
            linear(x, f"{path}self_attn.{p}_proj.weight", form).view(*ids.shape, -1, shape.head_dim).transpose(1, 2)
            for p in "qkv"
        )
        k, v = (t.repeat_interleave(shape.heads_per_group, 1) for t in (k, v))
        score = (rotate(q) @ rotate(k).transpose(-1, -2) * shape.head_dim**-0.5).masked_fill(future, float("-inf"))
        mixed = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        stream = stream + linear(mixed, f"{path}self_attn.o_proj.weight", form)
        x = norm(stream, f"{path}post_attention_layernorm.weight")
        gate, up = (linear(x, f"{path}mlp.{p}_proj.weight", layer.ffn_format) for p in ("gate", "up"))
        stream = stream + linear(gate * gate.sigmoid() * up, f"{path}mlp.down_proj.weight", layer.ffn_format)
    return linear(norm(stream, "model.norm.weight"), HEAD, candidate.head_format)


INT8, INT4 = Format(8, 32, "int8"), Format(4, 64, "int8")
MIXES = {
    "all": Candidate((Layer(128, 2, INT8, INT8),) * 3, INT8),
    "attention only": Candidate((Layer(128, 2, INT4, Format()),) * 3),
    "ffn only": Candidate((Layer(128, 2, Format(4, 32, "fp32"), INT8),) * 3),
    "head only": Candidate((Layer(128, 2),) * 3, INT4),
    "one layer": Candidate((Layer(128, 2), Layer(128, 2, INT8, INT4), Layer(128, 2)), Format(), INT4),
}


@pytest.mark.parametrize("candidate", MIXES.values(), ids=MIXES)
def test_activation_hooks_round_exactly_what_the_candidate_says(
    candidate: Candidate, tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    network = network_of(tiny_teacher)
    weights = quantized_weights(tiny_weights, candidate)
    with torch.no_grad():
        with network.activations(candidate):
            found = network(weights, ids)
        plain = network(weights, ids)
    difference = (found - written_out(weights, candidate, tiny_teacher.shape, ids)).abs().mean()
    effect = (plain - found).abs().mean()
    assert effect > 1e-3, "the hooks changed nothing"
    assert difference < effect / 20  # rounding ties that fall the other way, see test_quantize


def test_hooks_are_gone_afterwards_even_after_an_error(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    network = network_of(tiny_teacher)
    with torch.no_grad():
        before = network(tiny_weights, ids)
        with network.activations(MIXES["all"]):
            assert not torch.equal(network(tiny_weights, ids), before)
        with pytest.raises(RuntimeError), network.activations(MIXES["all"]):
            raise RuntimeError
        assert torch.equal(network(tiny_weights, ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


def test_gradients_reach_the_weights_through_rounding(
    tiny_teacher: Teacher, tiny_weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    network, candidate = network_of(tiny_teacher), MIXES["all"]
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in tiny_weights.items()}
    with network.activations(candidate):
        network(quantized_weights(parameters, candidate), ids).square().mean().backward()
    for name, value in parameters.items():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name
