"""Muon in both precisions: torch's own in bfloat16, and against singular values in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from paretune.teachers import muon

SHAPES = ((8, 24), (24, 8), (16, 16))
SETTINGS: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "original"}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(found: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator)


def test_in_bfloat16_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "training_dtype", lambda: torch.bfloat16)
    mine, theirs = parameters(), parameters()
    pair = muon.Muon(mine, **SETTINGS), torch.optim.Muon(theirs, **SETTINGS)
    for seed in range(3):
        for found, optimizer in zip((mine, theirs), pair, strict=True):
            give_gradients(found, seed)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_in_float32_singular_values_go_through_the_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton-Schulz acts on singular values alone, so in float64 one step can be written with an SVD."""
    monkeypatch.setattr(muon, "training_dtype", lambda: torch.float32)
    found = parameters()
    before = [p.detach().double() for p in found]
    give_gradients(found, 1)
    muon.Muon(found, **SETTINGS).step()
    for p, old in zip(found, before, strict=True):
        assert p.grad is not None
        gradient = p.grad.double()
        update = gradient + 0.95 * (0.05 * gradient - gradient)  # Nesterov, from an empty buffer
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        step = 0.02 * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * (u * s) @ v
        assert torch.allclose(p.detach().double(), old * (1 - 0.02 * 0.1) - step, atol=1e-5)


def test_what_has_no_gradient_stays_and_states_can_be_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "training_dtype", lambda: torch.float32)
    found = parameters()
    give_gradients(found[:1], 0)
    kept = found[1].detach().clone()
    optimizer = muon.Muon(found, **SETTINGS)
    optimizer.step()
    assert torch.equal(found[1], kept)
    other = torch.optim.Muon(parameters(), **SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    assert list(other.state_dict()["state"]) == [0]
