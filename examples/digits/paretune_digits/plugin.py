"""The plug-in: data, qualities and widths of the digits' VAE.

The data are the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import nn

from paretune.teachers.plugins.plugin import Batch, Outputs, Quality, TeacherPlugin, Width
from paretune_digits.vae import CHANNELS, HIDDEN, DigitVAE, cut

WEIGHTS = Path(__file__).resolve().parent / "weights.safetensors"
BATCH = 32
# Images of every split, multiples of the batch; the last five digits are left out.
SPLITS = {"train": 1184, "calibration": 64, "search": 224, "report": 320}


@cache
def digits() -> torch.Tensor:
    """All digits [1797, 1, 8, 8] in a fixed random order, pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def squared_error(outputs: Outputs, batch: Batch) -> torch.Tensor:
    """Mean squared error of every image [batch], pixels from 0 to 1."""
    found: torch.Tensor = (outputs[0] - batch.target).square().flatten(1).mean(1)
    return found


def psnr(outputs: Outputs, batch: Batch) -> torch.Tensor:
    """Peak signal-to-noise ratio of every image [batch] in dB."""
    return -10 * torch.log10(squared_error(outputs, batch).clamp_min(1e-10))


class Digits(TeacherPlugin):
    """The plug-in. Channels and hidden width can be cut; the most important ones are kept."""

    name = "digits"
    qualities = (
        Quality("squared_error", "squared error/pixel", "minimize", squared_error),
        Quality("psnr", "dB", "maximize", psnr),
    )
    widths = (Width("channels", (8, 12, CHANNELS)), Width("hidden", (32, 48, HIDDEN)))

    def load(self) -> nn.Module:
        from safetensors.torch import load_file

        module = DigitVAE()
        module.load_state_dict(load_file(WEIGHTS))
        return module

    def batches(self, split: str) -> list[Batch]:
        start = 0
        for name, count in SPLITS.items():
            if name == split:
                images = digits()[start : start + count]
                return [Batch((x,), x) for x in torch.split(images, BATCH)]
            start += count
        raise KeyError(split)

    def slice(self, module: nn.Module, widths: Mapping[str, int]) -> nn.Module:
        """A smaller VAE of the channels and hidden neurons with the largest weights."""
        assert isinstance(module, DigitVAE)
        return cut(module, widths["channels"], widths["hidden"])
