"""Write a random checkpoint of a known shape, to try what a search of that size needs: memory, time, disk. Never quality.

    python benchmarks/make_checkpoint.py DIR [--shape smollm-135m] [--seed 0] [--dtype float32]

Deterministic: the same arguments give the same bytes of weights. The tokenizer is the embedded one, padded with tokens that
no text contains up to the vocabulary of the shape, so any text encodes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from paretune.spaces import Shape
from paretune.teachers.checkpoint.layout import canonical_shapes, to_stored
from paretune.teachers.checkpoint.teacher import EMBEDDED_FOLDER
from paretune.teachers.checkpoint.training_state import write_tensors

STANDARD_DEVIATION = 0.02
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES = {
    "smollm-135m": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "smollm-360m": Shape(32, 960, 2560, 15, 5, 64, 49152),
    "gpt2-124m": Shape(12, 768, 3072, 12, 12, 64, 50257, True, "gpt2", 1024, False),
}


def config_of(shape: Shape) -> dict[str, Any]:
    """The config.json of a shape."""
    if shape.family == "gpt2":
        sizes = {"n_layer": shape.layers, "n_embd": shape.hidden, "n_inner": shape.ffn, "n_head": shape.heads}
        return GPT2 | sizes | {"n_positions": shape.positions, "vocab_size": shape.vocab}
    return LLAMA | {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
    }


def random_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Normal matrices of standard deviation 0.02 (those that write into the residual stream less), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, size in canonical_shapes(shape).items():
        if len(size) == 1:
            found[name] = torch.zeros(size) if name.endswith("bias") else torch.ones(size)
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = STANDARD_DEVIATION / (math.sqrt(2 * shape.layers) if writes else 1.0)
        found[name] = torch.empty(size).normal_(0.0, scale, generator=generator)
    return found


def padded_tokenizer(vocab: int) -> dict[str, Any]:
    """The embedded tokenizer's JSON with `vocab` tokens; those beyond its own belong to the BPE's vocabulary, but no merge makes
    them."""
    tokenizer: dict[str, Any] = json.loads((EMBEDDED_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    words: dict[str, int] = tokenizer["model"]["vocab"]
    for number in range(max(words.values()) + 1, vocab):
        words[f"<unused {number}>"] = number
    return tokenizer


def make_checkpoint(
    folder: Path, shape: Shape = SHAPES["smollm-135m"], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """A Hugging Face folder that `paretune search --teacher` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value.to(dtype) for name, value in to_stored(random_weights(shape, seed), shape).items()}
    write_tensors(folder / "model.safetensors", stored, {"format": "pt"})
    config = config_of(shape) | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        json.dumps(padded_tokenizer(shape.vocab), ensure_ascii=False), encoding="utf-8"
    )
    end = "<|end|>"
    names = {"bos_token": end, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="smollm-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    told = parser.parse_args()
    print(make_checkpoint(told.folder, SHAPES[told.shape], told.seed, getattr(torch, told.dtype)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
