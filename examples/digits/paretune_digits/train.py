"""Train the VAE anew and write weights.safetensors: `python -m paretune_digits.train` (about two minutes on one core)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from paretune_digits.plugin import SPLITS, WEIGHTS, Digits, digits, squared_error
from paretune_digits.vae import DigitVAE


def train(epochs: int = 300, beta: float = 0.02, seed: int = 0) -> DigitVAE:
    """Train on the first split: cross-entropy of the pixels plus `beta` times the divergence of the codes from a Gaussian."""
    torch.manual_seed(seed)
    model, images = DigitVAE(), digits()[: SPLITS["train"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(images) // 64 + 1))
    for _ in range(epochs):
        for batch in torch.split(images[torch.randperm(len(images))], 64):
            shifted = torch.roll(batch, (int(torch.randint(-1, 2, ())), int(torch.randint(-1, 2, ()))), (2, 3))
            chosen = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.3, shifted, batch)
            mean, log_variance = model.encoder(chosen)
            codes = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            pixels = F.binary_cross_entropy_with_logits(model.decoder(codes), chosen)
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 64
            optimizer.zero_grad()
            torch.autograd.backward(pixels + beta * divergence)
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    trained = train()
    save_file(trained.state_dict(), WEIGHTS)
    with torch.no_grad():
        error = torch.cat([squared_error((trained(*b.inputs),), b) for b in Digits().batches("report")]).mean()
    print(f"{sum(p.numel() for p in trained.parameters()):,} parameters, squared error {error:.5f} on the report split")
