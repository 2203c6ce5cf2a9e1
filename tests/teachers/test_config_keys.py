"""Only the keys that a family's network has reach transformers; others are ignored, or refused by name if they change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretune.common.errors import UsageError
from paretune.compression.network.student import Network
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from support import strange_teachers as strange

IDLE: dict[str, Any] = {
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "flash_attention_2",
    "_experts_implementation": "grouped_mm",
    "torch_dtype": "no_such_type",
    "dtype": {"text": "float16"},
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_return_dict": False,
    "torchscript": True,
    "gradient_checkpointing": True,
    "auto_map": {"AutoModelForCausalLM": "evil.Evil"},
    "_name_or_path": "evil/evil",
    "problem_type": "regression",
    "num_labels": 7,
    "id2label": {"0": "a"},
    "pruned_heads": {},
    "is_decoder": True,
    "tie_encoder_decoder": True,
    "chunk_size_feed_forward": 16,
    "attention_dropout": 0.5,
    "initializer_range": "broad",
    "pretraining_tp": 2,
    "transformers_version": "99",
    "quantization_config": None,
    "num_experts": 0,
    "layer_types": ["full_attention"] * 3,
    "hidden_act": "swish",
    "logit_scale": 1.0,
    "rope_interleaved": False,
    "unsloth_version": "2024.9",
}
REFUSED: dict[str, Any] = {
    "quantization_config": {"bits": 4, "quant_method": "gptq"},
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "partial_rotary_factor": 0.5,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "final_logit_softcapping": 30.0,
    "pruned_heads": {"0": [1]},
    "num_local_experts": 8,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    "rms_norm_eps": "small",
    "tie_word_embeddings": "yes",
    "rope_theta": "10k",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return strange.strange_teacher(tmp_path / "teacher")


def logits(teacher: Teacher) -> Any:
    import torch

    with torch.no_grad():
        network = Network(teacher.config, teacher.shape, teacher.shape.layers)
        return network(teacher.weights(), torch.arange(64)[None] * 3 % 288)


def test_keys_that_say_nothing_about_the_network_are_ignored(folder: Path) -> None:
    import torch

    before = load_teacher(str(folder))
    expected = logits(before)
    for key, value in IDLE.items():
        strange.merge(folder / "config.json", {key: value})
    teacher = load_teacher(str(folder))
    assert teacher.config.keys() == before.config.keys()
    assert torch.equal(logits(teacher), expected)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_change_the_network_are_refused_by_name(folder: Path, key: str) -> None:
    changes = {"rope_parameters": ...} if key.startswith("rope") else {}
    strange.merge(folder / "config.json", {**changes, key: REFUSED[key]})
    with pytest.raises(UsageError) as caught:
        load_teacher(str(folder))
    assert (key if key != "rope_scaling" else "rope_type") in caught.value.problem
    assert "config.json" in caught.value.problem


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "old": ({"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
    "new": (
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "both": (
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "type": ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2}),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}},
        {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 128},
    ),
    "length outside": (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
        {**LLAMA3, "original_max_position_embeddings": 128},
    ),
    "absent": ({}, {"rope_type": "default"}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_rotary_embedding_is_read_in_every_spelling(folder: Path, name: str) -> None:
    given, expected = SPELLINGS[name]
    strange.merge(folder / "config.json", {"rope_parameters": ..., **given})
    assert load_teacher(str(folder)).config["rope_parameters"] == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta must be the same everywhere"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "must agree"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3}, "original_max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "rope_type": "yarn"}}, "rope_type"),
    ],
)
def test_a_rotary_embedding_that_cannot_be_is_refused_by_name(folder: Path, given: dict[str, Any], words: str) -> None:
    strange.merge(folder / "config.json", {"rope_parameters": ..., **given})
    with pytest.raises(UsageError) as caught:
        load_teacher(str(folder))
    assert words in caught.value.problem


def test_a_configs_own_keys_do_not_come_into_the_artifact(folder: Path, tmp_path: Path) -> None:
    from support.artifacts import exported

    strange.merge(folder / "config.json", {"attn_implementation": "flash_attention_2", "output_attentions": True})
    written = json.loads((exported(folder, tmp_path / "artifact") / "hf" / "config.json").read_text())
    assert "attn_implementation" not in written and not written.get("output_attentions")
