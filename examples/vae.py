"""A variational autoencoder of digits, after pytorch/examples' vae."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

import tracker


class VAE(nn.Module):
    """Encodes pictures (N, 1, 8, 8) as normal distributions of 8 numbers, and decodes those."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.mean = nn.Linear(48, 8)
        self.logvar = nn.Linear(48, 8)
        self.fc3 = nn.Linear(8, 48)
        self.fc4 = nn.Linear(48, 64)

    def decode(self, z: Tensor) -> Tensor:
        """Return pictures (N, 1, 8, 8) for codes (N, 8)."""
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))).view(-1, 1, 8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pictures decoded, and the means and log variances of their codes."""
        hidden = F.relu(self.fc1(x.flatten(1)))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decode(z), mean, logvar


def loss_function(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Return the reconstruction's error plus the KL divergence, summed over the batch."""
    decoded, mean, logvar = output
    kld = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
    return F.binary_cross_entropy(decoded, x, reduction="sum") + kld


def main() -> None:
    """Train, and draw samples after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    images = torch.tensor(load_digits().images / 16).float().unsqueeze(1)
    loader = DataLoader(images, args.batch_size, shuffle=True)
    model = VAE()
    optimizer = optim.Adam(model.parameters(), lr=args.lr)

    with tracker.start_run(params=args, experiment="vae"):
        for epoch in range(1, args.epochs + 1):
            model.train()
            total = 0.0
            for batch in loader:
                optimizer.zero_grad()
                loss = loss_function(model(batch), batch)
                loss.backward()
                optimizer.step()
                total += loss.item()
            tracker.log_metric("loss", total / len(images), epoch)
            with torch.no_grad():
                samples = model.decode(torch.randn(8, 8))
            tracker.log_image(torch.cat(list(samples), dim=2), key="samples", step=epoch)
        tracker.log_model(model, images[:4])


if __name__ == "__main__":
    main()
