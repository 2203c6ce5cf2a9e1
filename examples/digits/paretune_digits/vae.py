"""The variational autoencoder (Kingma & Welling 2014, arXiv 1312.6114), and how it is cut.

The encoder gives the mean of a code of 12 numbers, the decoder draws the digit of a code. Evaluated without random draws,
so that every run gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

CODE, CHANNELS, HIDDEN = 12, 16, 64


class Encoder(nn.Module):
    """Images [batch, 1, 8, 8] to mean and log variance of their codes [batch, 12]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * channels, hidden)
        self.code = nn.Linear(hidden, 2 * CODE)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = F.silu(self.second(F.silu(self.first(images))))
        mean, log_variance = self.code(F.silu(self.hidden(found.flatten(1)))).chunk(2, 1)
        return mean, log_variance


class Decoder(nn.Module):
    """Codes [batch, 12] to logits of the pixels [batch, 1, 8, 8]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(CODE, hidden)
        self.grid = nn.Linear(hidden, 32 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        found = F.silu(self.grid(F.silu(self.hidden(codes))))
        logits: torch.Tensor = self.last(F.silu(self.up(found.view(len(codes), -1, 4, 4))))
        return logits


class DigitVAE(nn.Module):
    """Images to the images that their mean codes are decoded to; `decoder` alone draws new ones."""

    def __init__(self, channels: int = CHANNELS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(channels, hidden), Decoder(channels, hidden)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean, _ = self.encoder(images)
        return torch.sigmoid(self.decoder(mean))


def cut(module: DigitVAE, channels: int, hidden: int) -> DigitVAE:
    """A smaller VAE of the channels and hidden neurons with the largest weights."""
    small, state = DigitVAE(channels, hidden), dict(module.state_dict())
    for name, axis, kept in _cuts(state, channels, hidden):
        state[name] = state[name].index_select(axis, kept)
    small.load_state_dict(state)
    return small


def _cuts(state: Mapping[str, torch.Tensor], channels: int, hidden: int) -> list[tuple[str, int, torch.Tensor]]:
    """Which axes of which tensors keep which indices."""
    first = _largest(state["encoder.first.weight"], channels)
    second = _largest(state["encoder.second.weight"], 2 * channels)
    inner = _largest(state["encoder.hidden.weight"], hidden)
    drawn = _largest(state["decoder.hidden.weight"], hidden)
    planes = _largest(state["decoder.up.weight"], 2 * channels)
    last = _largest(state["decoder.up.weight"].transpose(0, 1), channels)
    return [
        ("encoder.first.weight", 0, first),
        ("encoder.first.bias", 0, first),
        ("encoder.second.weight", 1, first),
        ("encoder.second.weight", 0, second),
        ("encoder.second.bias", 0, second),
        ("encoder.hidden.weight", 1, _positions(second)),
        ("encoder.hidden.weight", 0, inner),
        ("encoder.hidden.bias", 0, inner),
        ("encoder.code.weight", 1, inner),
        ("decoder.hidden.weight", 0, drawn),
        ("decoder.hidden.bias", 0, drawn),
        ("decoder.grid.weight", 1, drawn),
        ("decoder.grid.weight", 0, _positions(planes)),
        ("decoder.grid.bias", 0, _positions(planes)),
        ("decoder.up.weight", 0, planes),
        ("decoder.up.weight", 1, last),
        ("decoder.up.bias", 0, last),
        ("decoder.last.weight", 1, last),
    ]


def _largest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the rows with the largest norms, in their own order."""
    found: torch.Tensor = weight.flatten(1).norm(dim=1).topk(count).indices.sort().values
    return found


def _positions(channels: torch.Tensor) -> torch.Tensor:
    """The 4 x 4 positions of every channel in a flattened image."""
    return (channels.unsqueeze(1) * 16 + torch.arange(16)).flatten()
