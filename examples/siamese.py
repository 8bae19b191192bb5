"""One network that compares two digits, after pytorch/examples' siamese_network."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

import tracker


class Siamese(nn.Module):
    """Tells whether two pictures (N, 1, 8, 8) show the same digit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the logit (N,) of "the same"."""
        distance = (self.body(first) - self.body(second)).abs()
        return self.head(distance).squeeze(1)


def pairs(images: Tensor, targets: Tensor) -> TensorDataset:
    """Return pairs of pictures and 1.0 if they show the same digit; half of the pairs do."""
    firsts, seconds = torch.randperm(len(images)), torch.randperm(len(images))
    for place in range(0, len(images), 2):
        same = (targets == targets[firsts[place]]).nonzero().squeeze(1)
        seconds[place] = same[torch.randint(len(same), ())]
    labels = (targets[firsts] == targets[seconds]).float()
    return TensorDataset(images[firsts], images[seconds], labels)


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images / 16).float().unsqueeze(1)
    targets = torch.tensor(digits.target)
    loader = DataLoader(pairs(images[:1400], targets[:1400]), args.batch_size, shuffle=True)
    *test_pair, same = pairs(images[1400:], targets[1400:]).tensors
    model = Siamese()
    optimizer = optim.Adam(model.parameters(), lr=args.lr)

    with tracker.start_run(params=args, experiment="siamese"):
        for epoch in range(1, args.epochs + 1):
            for first, second, labels in loader:
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(model(first, second), labels)
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                accuracy = ((model(*test_pair) > 0) == (same > 0)).float().mean()
            tracker.log_metrics({"loss": loss, "accuracy": accuracy}, epoch)
        tracker.log_model(model, (images[:4], images[4:8]))


if __name__ == "__main__":
    main()
