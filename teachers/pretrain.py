"""Train the embedded teacher `stdlib-coder` again: a 5.8M-parameter Llama on the standard library. Resumable.

    OMP_WAIT_POLICY=PASSIVE python -m paretune.teachers.pretrain OUT_DIR --seconds 2900 [--stop-after 600] [--seed 0]

Text: every module of the library but `SKIPPED_FOLDERS`; a module is held out when the first byte of the SHA-1 of its
path is below 6. Tokenizer: byte-level BPE of 4,096, trained on the modules outside test folders; every module ends with
token 0. Model: hidden 256, 6 layers, 8 heads, 4 KV heads, head_dim 32, FFN 768, tied embedding, context 256.
Optimizer: Muon (Jordan et al. 2024; lr 0.02, momentum 0.95, weight decay 0.05) on the layers' matrices, AdamW (3e-3) on
embedding and norms; residual projections start scaled by 1/sqrt(12). Schedule by time: 100 warm-up steps, constant for
half of --seconds, then linear to 2 %. Batch 16 x 256, bf16 autocast, torch.compile, gradient norm clipped at 1.
Running the same command again continues from the last checkpoint (every 60 s); the clock counts training time only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paretune.hardware_profiles.training_precision import autocast
from paretune.teachers.checkpoint.training_state import (
    load_tensors,
    optimizer_tensors,
    restore_optimizers,
    save_tensors,
)
from paretune.teachers.muon import Muon
from paretune.teachers.text.batches import Batches
from paretune.teachers.text.corpus import is_held_out, library_modules

VOCAB, CONTEXT, BATCH = 4096, 256, 16
CHECKPOINT_EVERY_S = 60.0
CURVE_EVERY_S = 300.0
MUON_LR, ADAMW_LR = 0.02, 3e-3


def learning_rate_scale(step: int, progress: float) -> float:
    """Warm up over 100 steps, hold until half of the time, then fall linearly to 2 %; `progress` is in [0, 1]."""
    return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.5 else max(0.02, 1 - (progress - 0.5) / 0.5))


@torch.no_grad()
def held_out_nll(model: Any, tokens: torch.Tensor, windows: int) -> float:
    """Mean NLL in nats/token over the first `windows` windows of 256 tokens (255 targets each), in the machine's training precision."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, windows, 25):
        x = torch.stack([tokens[j * CONTEXT : (j + 1) * CONTEXT] for j in range(start, min(windows, start + 25))])
        with autocast():
            logits = model(x, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        count += x[:, 1:].numel()
    model.train()
    return total / count


def make_model() -> Any:
    """Return the untrained Llama; its residual projections are scaled by 1/sqrt(12)."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(1 / math.sqrt(12))
    return model


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, and AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": [model.model.embed_tokens.weight]},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(groups, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def train_tokenizer(out: Path, paths: list[Path]) -> ByteLevelBPETokenizer:
    """Train a byte-level BPE tokenizer of VOCAB tokens on the files `paths`, and write it to bpe.json in `out`."""
    target = out / "bpe.json"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(p) for p in paths], vocab_size=VOCAB, special_tokens=["<|end|>"])
    tokenizer.save(str(target))
    return tokenizer


def encode(tokenizer: ByteLevelBPETokenizer, paths: list[Path]) -> torch.Tensor:
    """Return the token ids (int64) of all files, one after the other, each ended by token 0."""
    ids = [np.array([*tokenizer.encode(p.read_text("utf8", "ignore")).ids, 0]) for p in paths]
    return torch.from_numpy(np.concatenate(ids).astype(np.int64))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=2900.0, help="length of the schedule in seconds of training")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, help="stop (resumable) after so many seconds of training"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, arguments.seconds, arguments.stop_after, arguments.seed)


def train(out: Path, seconds: float, stop_after: float, seed: int) -> None:
    """Train until `seconds`, or stop resumably at `stop_after`; writes a Hugging Face folder when complete."""
    torch.manual_seed(seed)
    modules = library_modules()
    train_files = [p for n, p in modules if not is_held_out(n)]
    held_out_files = [p for n, p in modules if is_held_out(n)]
    tokenizer = train_tokenizer(out, [p for p in train_files if "test" not in p.parts])
    tokens, held_out = encode(tokenizer, train_files), encode(tokenizer, held_out_files)
    print(f"{len(tokens):,} training tokens, {len(held_out):,} held out", flush=True)
    model = make_model()
    optimizers = make_optimizers(model)
    peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    batches, checkpoint = Batches(tokens, CONTEXT, BATCH, seed), out / "state.safetensors"
    step, elapsed, curve = 0, 0.0, []
    if checkpoint.exists():
        tensors, meta = load_tensors(checkpoint)
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if not k.startswith("optimizer")}, strict=False
        )
        restore_optimizers(optimizers, tensors)
        step, elapsed, curve = meta["step"], meta["elapsed"], meta["curve"]
        print(f"continuing at step {step:,}, {elapsed:.0f} s", flush=True)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        with autocast():
            hidden = model.model(x, use_cache=False).last_hidden_state[:, :-1]
            logits = F.linear(hidden, model.lm_head.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())

    compiled = torch.compile(loss_of)
    torch.autograd.backward(compiled(batches.at(0)))  # compile outside the clock
    for optimizer in optimizers:
        optimizer.zero_grad()

    def save() -> None:
        named = {f"model.{n}": p for n, p in model.named_parameters()}
        save_tensors(
            checkpoint, {**named, **optimizer_tensors(optimizers)}, {"step": step, "elapsed": elapsed, "curve": curve}
        )

    mark, saved = time.monotonic(), elapsed
    while elapsed < min(seconds, stop_after):
        scale = learning_rate_scale(step, elapsed / seconds)
        for optimizer, rates in zip(optimizers, peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        torch.autograd.backward(compiled(batches.at(step)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        now = time.monotonic()
        elapsed, mark = elapsed + now - mark, now
        if elapsed > CURVE_EVERY_S * (len(curve) + 1):
            curve.append([round(elapsed), step * BATCH * CONTEXT, round(held_out_nll(model, held_out, 100), 4)])
            print(curve[-1], flush=True)
        if elapsed - saved > CHECKPOINT_EVERY_S:
            save()
            saved = elapsed
    save()
    if elapsed >= seconds:
        _finish(
            out, model, held_out, held_out_files, {"tokens": step * BATCH * CONTEXT, "seconds": seconds, "curve": curve}
        )


def _finish(out: Path, model: Any, held_out: torch.Tensor, held_out_files: list[Path], figures: dict[str, Any]) -> None:
    nll = held_out_nll(model, held_out, len(held_out) // CONTEXT)
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_file=str(out / "bpe.json"), bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(out)
    digests = {
        n: hashlib.sha256(p.read_text("utf8", "ignore").encode()).hexdigest()
        for n, p in library_modules()
        if is_held_out(n)
    }
    (out / "heldout.json").write_text(
        json.dumps({"python": platform.python_version(), "modules": digests}, indent=1), encoding="utf-8"
    )
    size = sum(path.stat().st_size for path in held_out_files)
    figures |= {"held_out_nll": nll, "bits_per_byte": nll * len(held_out) / size / math.log(2)}
    (out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(figures)


if __name__ == "__main__":
    main()
