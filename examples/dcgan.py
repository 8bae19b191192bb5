"""Two networks that learn from each other to draw digits, after pytorch/examples' dcgan."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader

import tracker

NOISE = 16


def generator() -> nn.Sequential:
    """Return a network that makes pictures (N, 1, 8, 8) of noise (N, 16, 1, 1)."""
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 64, 2, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def discriminator() -> nn.Sequential:
    """Return a network that gives each picture (N, 1, 8, 8) a score (N,): high if it is real."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 2),
        nn.Flatten(0),
    )


def main() -> None:
    """Train both in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parser.parse_args()

    images = torch.tensor(load_digits().images / 8 - 1).float().unsqueeze(1)
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
    net_g, net_d = generator(), discriminator()
    optimizer_g = optim.Adam(net_g.parameters(), lr=args.lr, betas=(0.5, 0.999))
    optimizer_d = optim.Adam(net_d.parameters(), lr=args.lr, betas=(0.5, 0.999))
    fixed_noise = torch.randn(8, NOISE, 1, 1)
    step = 0

    with tracker.start_run(params=args, experiment="dcgan"):
        for epoch in range(1, args.epochs + 1):
            for real in loader:
                fake = net_g(torch.randn(len(real), NOISE, 1, 1))
                optimizer_d.zero_grad()
                on_real, on_fake = net_d(real), net_d(fake.detach())
                loss_d = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
                loss_d.backward()
                optimizer_d.step()
                optimizer_g.zero_grad()
                loss_g = F.softplus(-net_d(fake)).mean()
                loss_g.backward()
                optimizer_g.step()
                step += 1
                tracker.log_metrics({"loss_d": loss_d, "loss_g": loss_g}, step)
            with torch.no_grad():
                samples = (net_g(fixed_noise) + 1) / 2
            tracker.log_image(torch.cat(list(samples), dim=2), key="samples", step=epoch)
        tracker.log_model(net_g, fixed_noise, "generator")
        tracker.log_model(net_d, images[:4], "discriminator")


if __name__ == "__main__":
    main()
